"""What the conformance tests share: the fetched suites, the models they run on, and the record of every outcome."""
