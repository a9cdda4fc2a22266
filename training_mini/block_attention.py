"""
Causal attention for training on CPUs, as products of matrices by torch.

torch's fused kernel reaches a fraction of the speed of matrix products there, most of all in bfloat16. Here the queries
are taken in blocks: a block is one product with the keys that it may see, for all heads that share these keys. The
probabilities are kept for the backward pass, in memory that grows with the square of the length, so long sequences
stay with the fused kernel.
"""

from collections.abc import Iterator
from typing import Any

import torch

BLOCK = 64  # queries; half as many make the products too small, twice as many compute more that is masked
BYTES_AT_ONCE = 2**19  # of the scores of a block, for each thread: they stay in the cache of a core
MOST_BYTES = 2**27  # of the probabilities of a layer


# torch.compile does not look inside. It keeps compiled blocks on disk by the names of their operators: give this one
# another name when the layout of its results changes.
@torch.library.custom_op("mini::causal_attention", mutates_args=())
def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Causal attention, in the type of its inputs.

    Args:
        query: (batch, heads, length, head_dim).
        key, value: (batch, key_value_heads, length, head_dim).
        scaling: the factor on the scores.

    Returns:
        The output (batch, length, heads, head_dim), and for the backward pass the probabilities, block after block.
    """
    queries, keys, values = pack_all(query, key, value, scaling)
    length = keys.shape[1]
    group = queries.shape[1] // length
    output = torch.empty_like(queries)
    probabilities = queries.new_empty(number_of_probabilities(len(queries), group, length))
    # What a query must not see in the square of the keys of its own block.
    later = torch.full((BLOCK, BLOCK), -torch.inf, dtype=query.dtype).triu_(1).repeat_interleave(group, dim=0)
    for pairs, rows, block in blocks_of_scores(queries, keys, probabilities):
        end, size = block.shape[2], block.shape[1] // group
        torch.bmm(queries[pairs, rows], keys[pairs, :end].mT, out=block)
        block[..., end - size :] += later[: size * group, :size]
        torch.softmax(block, dim=-1, out=block)
        output[pairs, rows] = block @ values[pairs, :end]
    return unpack(output, query.shape), probabilities


@causal_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, head_dim = query.shape
    key_value_heads = key.shape[1]
    number = number_of_probabilities(batch * key_value_heads, heads // key_value_heads, length)
    return query.new_empty(batch, length, heads, head_dim), query.new_empty(number)


@torch.library.custom_op("mini::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    probabilities: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `causal_attention` by query, key and value, from that by its output."""
    queries, keys, values = pack_all(query, key, value, scaling)
    gradients = pack(gradient.transpose(1, 2), key.shape[1])
    # Not zeros_like: it would keep the strides of keys that are a view, and the compiler is told of contiguous ones.
    of_keys, of_values = keys.new_zeros(keys.shape), values.new_zeros(values.shape)
    of_queries = torch.empty_like(queries)
    for pairs, rows, block in blocks_of_scores(queries, keys, probabilities):
        end = block.shape[2]
        of_values[pairs, :end].baddbmm_(block.mT, gradients[pairs, rows])
        of_block = gradients[pairs, rows] @ values[pairs, :end].mT
        of_scores = torch._softmax_backward_data(of_block, block, -1, block.dtype)
        of_queries[pairs, rows] = of_scores @ keys[pairs, :end]
        of_keys[pairs, :end].baddbmm_(of_scores.mT, queries[pairs, rows])
    of_queries *= scaling
    of_query = unpack(of_queries, query.shape).transpose(1, 2)
    return of_query, of_keys.view(key.shape), of_values.view(value.shape)


@causal_attention_backward.register_fake
def _(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    probabilities: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_query = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
    return of_query, key.new_empty(key.shape), value.new_empty(value.shape)


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *states, ctx.scaling = inputs
    ctx.save_for_backward(*states, output[1])


def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *causal_attention_backward(gradient, *ctx.saved_tensors, ctx.scaling), None


causal_attention.register_autograd(backward, setup_context=keep_for_backward)


def pack_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The queries by `pack`, times the scaling, and keys and values (batch * key_value_heads, length, head_dim)."""
    return pack(query, key.shape[1]).mul_(scaling), key.flatten(0, 1), value.flatten(0, 1)


def pack(states: torch.Tensor, key_value_heads: int) -> torch.Tensor:
    """
    (batch, heads, length, head_dim) to a copy (batch * key_value_heads, length * heads of a group, head_dim): the heads
    of a group lie side by side, so that a block of positions is a slice.
    """
    batch, heads, length, head_dim = states.shape
    states = states.reshape(batch, key_value_heads, heads // key_value_heads, length, head_dim).transpose(2, 3)
    packed = torch.empty(states.shape, dtype=states.dtype).copy_(states)
    return packed.view(batch * key_value_heads, -1, head_dim)


def unpack(states: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What `pack` has made of states of this shape, as (batch, length, heads, head_dim)."""
    batch, heads, length, head_dim = shape
    states = states.view(batch, -1, length, heads * batch // len(states), head_dim).transpose(1, 2)
    return states.reshape(batch, length, heads, head_dim).contiguous()  # with one head in a group, it is still a view


def number_of_probabilities(pairs: int, group: int, length: int) -> int:
    """How many are kept for the backward pass; `pairs` and `group` as in `blocks_of_scores`."""
    return sum(pairs * (end - begin) * group * end for begin, end in spans_of(length))


def blocks_of_scores(
    queries: torch.Tensor, keys: torch.Tensor, probabilities: torch.Tensor
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """
    The parts of the work: some pairs of a sequence and a key/value head, whose scores fit into the cache together; the
    rows of a block of queries in `pack`; and its probabilities (pairs, rows, keys up to the end of the block).
    """
    pairs, length = keys.shape[:2]
    group = queries.shape[1] // length
    at_once = max(1, BYTES_AT_ONCE * torch.get_num_threads() // (BLOCK * group * length * probabilities.element_size()))
    for first in range(0, pairs, at_once):
        number, offset = min(at_once, pairs - first), 0
        for begin, end in spans_of(length):
            # All pairs of a span lie together, however many are computed at once: the backward pass may have another
            # number of threads.
            of_pair = (end - begin) * group * end
            block = probabilities[offset + first * of_pair : offset + (first + number) * of_pair]
            offset += pairs * of_pair
            yield slice(first, first + number), slice(begin * group, end * group), block.view(number, -1, end)


def spans_of(length: int) -> list[tuple[int, int]]:
    """The first position of each block, and the first after it."""
    return [(begin, min(length, begin + BLOCK)) for begin in range(0, length, BLOCK)]


def fits_in_blocks(batch: int, heads: int, length: int, dtype: torch.dtype) -> bool:
    """Whether the probabilities are few enough to be kept for the backward pass."""
    return batch * heads * length * length * dtype.itemsize <= MOST_BYTES
