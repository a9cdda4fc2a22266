"""Everything that only training needs."""
