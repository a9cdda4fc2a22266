"""
Causal attention for training on CPUs in float32, as two functions in C++: the forward and the backward pass.

A head of a small model has few numbers: torch's fused kernel then spends most of its time around its products, and
attention in blocks (block_attention.py) in writing and reading probabilities. Here all that belongs to a block of
queries stays in the cache of a core. The backward pass computes the probabilities again, as in FlashAttention
(https://arxiv.org/abs/2205.14135), so memory grows with the length of a sequence and not with its square.
"""

import ctypes
import functools
from typing import Any

import torch
from modeling_mini.native_code import VECTORS, load_library

from .block_attention import keep_for_backward

SOURCE = (
    VECTORS
    + r"""
#include <omp.h>
#include <memory>

// A tile is what one loop computes of a product of matrices: ROWS rows of COLUMNS columns. Its sums stay in registers,
// 12 of 16 or 24 of 32.
constexpr int ROWS = WIDTH == 16 ? 12 : 6;
constexpr int PANEL = 2; // vectors of a row
constexpr int COLUMNS = PANEL * WIDTH;
constexpr int64_t BLOCK = 72; // queries, a multiple of ROWS
constexpr float UNSEEN = -1e30f; // the score of a key that comes after the query

struct Sizes {
    int64_t batch, heads, kv_heads, length, head_dim, threads;
    float scaling; // of scores
};

// (batch, heads, length, head_dim), by strides; head_dim is contiguous.
struct States {
    float *data;
    int64_t batch, head, token;
    float *at(int64_t sequence, int64_t number) const { return data + sequence * batch + number * head; }
};

static int64_t padded(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Copies of what one head needs, with widths that are whole tiles: what is added is zero. Tiles write up to ROWS rows,
// also where fewer are left.
struct Workspace {
    const int64_t width, length; // of head_dim and a sequence
    std::unique_ptr<float[]> numbers;
    float *keys, *values, *key_gradients, *value_gradients; // (length, width)
    float *keys_t, *values_t;                               // (length / COLUMNS, width, COLUMNS)
    float *queries, *gradients, *results;                   // (BLOCK, width)
    float *scores, *score_gradients;                        // (BLOCK, length)

    explicit Workspace(const Sizes &sizes)
        : width(padded(sizes.head_dim, COLUMNS)), length(padded(sizes.length + ROWS, COLUMNS)) {
        numbers.reset(new float[6 * length * width + 3 * BLOCK * width + 2 * BLOCK * length]);
        float *next = numbers.get();
        for (float **each : {&keys, &values, &key_gradients, &value_gradients, &keys_t, &values_t})
            *each = next, next += length * width;
        for (float **each : {&queries, &gradients, &results}) *each = next, next += BLOCK * width;
        for (float **each : {&scores, &score_gradients}) *each = next, next += BLOCK * length;
    }
};

// left (ROWS, count) times right (count, COLUMNS).
static void tile(const float *left, int64_t row_stride, int64_t k_stride, const float *right, int64_t right_stride,
                 float *to, int64_t to_stride, int64_t count, bool adds) {
    Vector sums[ROWS][PANEL]{};
    for (int64_t k = 0; k < count; k++) {
        Vector parts[PANEL];
        for (int i = 0; i < PANEL; i++) parts[i] = load(right + k * right_stride + i * WIDTH);
        for (int row = 0; row < ROWS; row++)
            for (int i = 0; i < PANEL; i++) sums[row][i] += left[row * row_stride + k * k_stride] * parts[i];
    }
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < PANEL; i++) {
            float *place = to + row * to_stride + i * WIDTH;
            store(place, adds ? load(place) + sums[row][i] : sums[row][i]);
        }
}

// Rows of head_dim numbers to rows of `width`, times a factor, and rows of zeros up to `all_rows`.
static void pack(const float *from, int64_t stride, int64_t rows, int64_t head_dim, float factor, float *to,
                 int64_t all_rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++) {
#pragma omp simd
        for (int64_t i = 0; i < head_dim; i++) to[row * width + i] = from[row * stride + i] * factor;
        for (int64_t i = head_dim; i < width; i++) to[row * width + i] = 0;
    }
    std::fill(to + rows * width, to + all_rows * width, 0.0f);
}

// Rows of `width` numbers to rows of head_dim, times a factor.
static void unpack(const float *from, int64_t width, int64_t rows, int64_t head_dim, float factor, float *to,
                   int64_t stride) {
    for (int64_t row = 0; row < rows; row++)
#pragma omp simd
        for (int64_t i = 0; i < head_dim; i++) to[row * stride + i] = from[row * width + i] * factor;
}

// (rows, columns) to (rows / COLUMNS, columns, COLUMNS): a tile reads what it needs of it in the order of memory.
static void transpose(const float *from, int64_t rows, int64_t columns, float *to) {
    for (int64_t first = 0; first < rows; first += COLUMNS)
        for (int64_t column = 0; column < columns; column++)
            for (int64_t row = first; row < first + COLUMNS; row++) *to++ = from[row * columns + column];
}

// The products of the rows of a block, the first of which is at a position, with all keys that they may see.
static void products_with_keys(const Workspace &work, const float *left, const float *keys_t, int64_t position,
                               int64_t rows, float *to) {
    const int64_t end = position + padded(rows, ROWS);
    for (int64_t key = 0; key < end; key += COLUMNS)
        for (int64_t row = std::max<int64_t>(0, (key - position) / ROWS * ROWS); row < rows; row += ROWS)
            tile(left + row * work.width, work.width, 1, keys_t + key * work.width, COLUMNS,
                 to + row * work.length + key, work.length, work.width, false);
}

// The sums of what keys or values give to the rows of a block, each with its weight, in `work.results`.
static void sums_over_keys(const Workspace &work, const float *weights, const float *right, int64_t position,
                           int64_t rows) {
    for (int64_t row = 0; row < rows; row += ROWS)
        for (int64_t column = 0; column < work.width; column += COLUMNS)
            tile(weights + row * work.length, work.length, 1, right + column, work.width,
                 work.results + row * work.width + column, work.width, position + row + ROWS, false);
}

// Adds to each key or value the sum of what the rows of a block give it, each with its weight.
static void sums_over_rows(const Workspace &work, const float *weights, const float *right, int64_t position,
                           int64_t rows, float *to) {
    for (int64_t key = 0; key < position + rows; key += ROWS) {
        const int64_t first = std::max<int64_t>(0, key - position); // row that sees the key
        for (int64_t column = 0; column < work.width; column += COLUMNS)
            tile(weights + first * work.length + key, 1, work.length, right + first * work.width + column, work.width,
                 to + key * work.width + column, work.width, rows - first, true);
    }
}

static void hide(float *scores, int64_t seen) { // up to the end of a vector
    std::fill(scores + seen, scores + padded(seen, WIDTH), UNSEEN);
}

// A tile reads up to ROWS weights of keys that its rows do not see.
static void clear(float *weights, int64_t seen) { std::fill(weights + seen, weights + seen + ROWS, 0.0f); }

// Scores of a row to weights that are not yet divided by their sum. Returns the highest score and the sum.
static std::pair<float, float> softmax(float *scores, int64_t seen) {
    hide(scores, seen);
    Vector highest = load(scores);
    for (int64_t i = WIDTH; i < seen; i += WIDTH) {
        const Vector next = load(scores + i);
        highest = next > highest ? next : highest;
    }
    float most = highest[0];
    for (int i = 1; i < WIDTH; i++) most = std::max(most, highest[i]);
    Vector sum{};
    for (int64_t i = 0; i < seen; i += WIDTH) {
        const Vector weights = exp_of(load(scores + i) - most);
        store(scores + i, weights);
        sum += weights;
    }
    clear(scores, seen);
    return {most, sum_of(sum)};
}

// Scores of a row to probabilities, and the gradients of the probabilities to those of the scores. Where scores are
// large, `log_sum` is rounded too coarsely for a sum of 1, so the probabilities are divided by their sum once more.
static void softmax_backward(float *scores, float *gradients, float log_sum, int64_t seen) {
    hide(scores, seen);
    Vector sum{}, gradient_sum{};
    for (int64_t i = 0; i < seen; i += WIDTH) {
        const Vector weights = exp_of(load(scores + i) - log_sum);
        store(scores + i, weights);
        sum += weights;
        gradient_sum += weights * load(gradients + i);
    }
    const float scale = 1 / sum_of(sum), mean = scale * sum_of(gradient_sum);
    for (int64_t i = 0; i < seen; i += WIDTH) {
        const Vector probabilities = scale * load(scores + i);
        store(scores + i, probabilities);
        store(gradients + i, probabilities * (load(gradients + i) - mean));
    }
    clear(scores, seen);
    clear(gradients, seen);
}

// Writes the output, and for the backward pass the logarithm of the sum of the exponentials of the scores of each query
// (batch, heads, length).
extern "C" void attention_forward(const Sizes &sizes, const States &query, const States &key, const States &value,
                                  const States &output, float *log_sums) {
    const int64_t group = sizes.heads / sizes.kv_heads;
#pragma omp parallel num_threads(sizes.threads)
    {
        Workspace work(sizes);
        int64_t packed = -1; // the head of keys and values in the workspace
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < sizes.batch * sizes.heads; number++) {
            const int64_t sequence = number / sizes.heads, head = number % sizes.heads, kv_head = head / group;
            if (packed != number / group) {
                packed = number / group;
                // What tiles add of rows after the last key has the weight 0, and must be finite.
                pack(key.at(sequence, kv_head), key.token, sizes.length, sizes.head_dim, 1, work.keys, work.length,
                     work.width);
                transpose(work.keys, work.length, work.width, work.keys_t);
                pack(value.at(sequence, kv_head), value.token, sizes.length, sizes.head_dim, 1, work.values,
                     work.length, work.width);
            }
            for (int64_t first = 0; first < sizes.length; first += BLOCK) {
                const int64_t rows = std::min(BLOCK, sizes.length - first);
                pack(query.at(sequence, head) + first * query.token, query.token, rows, sizes.head_dim, sizes.scaling,
                     work.queries, padded(rows, ROWS), work.width);
                products_with_keys(work, work.queries, work.keys_t, first, rows, work.scores);
                float sums[BLOCK];
                for (int64_t row = 0; row < rows; row++) {
                    const auto [highest, sum] = softmax(work.scores + row * work.length, first + row + 1);
                    sums[row] = sum;
                    log_sums[number * sizes.length + first + row] = highest + std::log(sum);
                }
                sums_over_keys(work, work.scores, work.values, first, rows);
                for (int64_t row = 0; row < rows; row++)
                    unpack(work.results + row * work.width, work.width, 1, sizes.head_dim, 1 / sums[row],
                           output.at(sequence, head) + (first + row) * output.token, output.token);
            }
        }
    }
}

// Writes the gradients by query, key and value, from that by the output.
extern "C" void attention_backward(const Sizes &sizes, const States &query, const States &key, const States &value,
                                   const float *log_sums, const States &gradient, const States &query_gradient,
                                   const States &key_gradient, const States &value_gradient) {
    const int64_t group = sizes.heads / sizes.kv_heads;
#pragma omp parallel num_threads(sizes.threads)
    {
        Workspace work(sizes);
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < sizes.batch * sizes.kv_heads; number++) {
            const int64_t sequence = number / sizes.kv_heads, kv_head = number % sizes.kv_heads;
            pack(key.at(sequence, kv_head), key.token, sizes.length, sizes.head_dim, 1, work.keys, work.length,
                 work.width);
            transpose(work.keys, work.length, work.width, work.keys_t);
            pack(value.at(sequence, kv_head), value.token, sizes.length, sizes.head_dim, 1, work.values, work.length,
                 work.width);
            transpose(work.values, work.length, work.width, work.values_t);
            std::fill_n(work.key_gradients, work.length * work.width, 0.0f);
            std::fill_n(work.value_gradients, work.length * work.width, 0.0f);
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
                for (int64_t first = 0; first < sizes.length; first += BLOCK) {
                    const int64_t rows = std::min(BLOCK, sizes.length - first), all_rows = padded(rows, ROWS);
                    pack(query.at(sequence, head) + first * query.token, query.token, rows, sizes.head_dim,
                         sizes.scaling, work.queries, all_rows, work.width);
                    pack(gradient.at(sequence, head) + first * gradient.token, gradient.token, rows, sizes.head_dim, 1,
                         work.gradients, all_rows, work.width);
                    products_with_keys(work, work.queries, work.keys_t, first, rows, work.scores);
                    products_with_keys(work, work.gradients, work.values_t, first, rows, work.score_gradients);
                    const float *log_sum = log_sums + (sequence * sizes.heads + head) * sizes.length + first;
                    for (int64_t row = 0; row < rows; row++)
                        softmax_backward(work.scores + row * work.length, work.score_gradients + row * work.length,
                                         log_sum[row], first + row + 1);
                    sums_over_keys(work, work.score_gradients, work.keys, first, rows);
                    unpack(work.results, work.width, rows, sizes.head_dim, sizes.scaling,
                           query_gradient.at(sequence, head) + first * query_gradient.token, query_gradient.token);
                    sums_over_rows(work, work.scores, work.gradients, first, rows, work.value_gradients);
                    sums_over_rows(work, work.score_gradients, work.queries, first, rows, work.key_gradients);
                }
            unpack(work.key_gradients, work.width, sizes.length, sizes.head_dim, 1,
                   key_gradient.at(sequence, kv_head), key_gradient.token);
            unpack(work.value_gradients, work.width, sizes.length, sizes.head_dim, 1,
                   value_gradient.at(sequence, kv_head), value_gradient.token);
        }
    }
}
"""
)


class SizesStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "length", "head_dim", "threads")),
        ("scaling", ctypes.c_float),
    ]

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, scaling: float) -> "SizesStruct":
        batch, heads, length, head_dim = query.shape
        return cls(batch, heads, key.shape[1], length, head_dim, torch.get_num_threads(), scaling)


class StatesStruct(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "token")),
    ]

    @classmethod
    def of(cls, states: torch.Tensor) -> "StatesStruct":
        return cls(states.data_ptr(), *states.stride()[:3])


@functools.cache
def attention_library() -> ctypes.CDLL:
    """Raises RuntimeError or OSError, as `load_library`."""
    return load_library("attention", SOURCE)


# torch.compile does not look inside. It keeps compiled blocks on disk by the names of their operators: give this one
# another name when the layout of its results changes.
@torch.library.custom_op("mini::native_attention", mutates_args=())
def native_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Causal attention in float32.

    Args:
        query: (batch, heads, length, head_dim).
        key, value: (batch, key_value_heads, length, head_dim).
        scaling: the factor on the scores.

    Returns:
        The output (batch, length, heads, head_dim), and for the backward pass the logarithms of the sums of the
        exponentials of the scores (batch, heads, length).
    """
    states = with_contiguous_heads(query, key, value)
    output, log_sums = new_output(query), query.new_empty(query.shape[:3])
    attention_library().attention_forward(
        ctypes.byref(SizesStruct.of(query, key, scaling)),
        *(ctypes.byref(StatesStruct.of(each)) for each in (*states, output.transpose(1, 2))),
        ctypes.c_void_p(log_sums.data_ptr()),
    )
    return output, log_sums


@native_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    return new_output(query), query.new_empty(query.shape[:3])


@torch.library.custom_op("mini::native_attention_backward", mutates_args=())
def native_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_sums: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `native_attention` by query, key and value, from that by its output."""
    *states, gradient = with_contiguous_heads(query, key, value, gradient.transpose(1, 2))
    gradients = [new_output(each).transpose(1, 2) for each in (query, key, value)]
    attention_library().attention_backward(
        ctypes.byref(SizesStruct.of(query, key, scaling)),
        *(ctypes.byref(StatesStruct.of(each)) for each in states),
        ctypes.c_void_p(log_sums.data_ptr()),
        *(ctypes.byref(StatesStruct.of(each)) for each in (gradient, *gradients)),
    )
    return tuple(gradients)


@native_attention_backward.register_fake
def _(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_sums: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(new_output(each).transpose(1, 2) for each in (query, key, value))


def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *native_attention_backward(gradient, *ctx.saved_tensors, ctx.scaling), None


native_attention.register_autograd(backward, setup_context=keep_for_backward)


def new_output(states: torch.Tensor) -> torch.Tensor:
    """For states (batch, heads, length, head_dim) an empty tensor (batch, length, heads, head_dim)."""
    batch, heads, length, head_dim = states.shape
    return states.new_empty(batch, length, heads, head_dim)


def with_contiguous_heads(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [each if each.stride(-1) == 1 else each.contiguous() for each in tensors]
