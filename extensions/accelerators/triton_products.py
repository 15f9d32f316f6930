"""The products of the Triton kernels, with sums in fp32: from tokens to rank rows of a table (shrink), and back (expand).

Tensors are row-major. `table` has a rank row for each line; `tokens` is the number of tokens of a batch row (of a group in
the `each` kernels). Group g uses the rank rows index[g, :count[g]], with the weights weight[g, :count[g]]; `index`, `weight`
and `hidden` have `width` columns. Importing this needs Triton; nothing does before a kernel runs.
"""

import triton
import triton.language as tl


@triton.jit
def shrink_each(
    x, table, index, weight, count, hidden, tokens, num_features, width, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr
):
    """Store hidden[n, r] = weight * (x_NI[n] . table row) for the rank rows of token n's group; one token at a time."""
    token = tl.program_id(0).to(tl.int64)
    group = token // tokens
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    used = r < tl.load(count + group)
    row = tl.load(index + group * width + r, mask=used, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, num_features, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = i < num_features
        x_I = tl.load(x + token * num_features + i, mask=inside, other=0.0).to(tl.float32)
        table_RI = tl.load(
            table + row[:, None] * num_features + i[None, :], mask=used[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(table_RI * x_I[None, :], axis=1)
    total *= tl.load(weight + group * width + r, mask=used, other=0.0)
    tl.store(hidden + token * width + r, total, mask=used)


@triton.jit
def expand_each(
    hidden,
    table,
    index,
    count,
    y,
    tokens,
    num_features,
    width,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Store y[n] = hidden[n] @ the rank rows of token n's group (added to y[n] with ADD); one token at a time."""
    token = tl.program_id(0).to(tl.int64)
    group = token // tokens
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = o < num_features
    num_ranks = tl.load(count + group)
    total = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for start in range(0, num_ranks, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        used = r < num_ranks
        row = tl.load(index + group * width + r, mask=used, other=0).to(tl.int64)
        hidden_R = tl.load(hidden + token * width + r, mask=used, other=0.0)
        table_RO = tl.load(
            table + row[:, None] * num_features + o[None, :], mask=used[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(table_RO * hidden_R[:, None], axis=0)
    place = y + token * num_features + o
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def shrink_group(
    x,
    table,
    index,
    weight,
    count,
    member,
    first,
    hidden,
    tokens,
    num_features,
    width,
    AS_FP32: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Store hidden[n, r] = weight * (x_NI[n] . table row) for tokens n of batch rows member[first[g] : first[g + 1]]."""
    group = tl.program_id(0)
    begin = tl.load(first + group)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = n < (tl.load(first + group + 1) - begin) * tokens
    num_ranks = tl.load(count + group)
    if (tl.program_id(2) * BLOCK_R < num_ranks) & (tl.max(present.to(tl.int32), axis=0) > 0):
        token = tl.load(member + begin + n // tokens, mask=present, other=0).to(tl.int64) * tokens + n % tokens
        r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
        used = r < num_ranks
        row = tl.load(index + group * width + r, mask=used, other=0).to(tl.int64)
        total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for start in range(0, num_features, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            inside = i < num_features
            x_NI = tl.load(
                x + token[:, None] * num_features + i[None, :], mask=present[:, None] & inside[None, :], other=0.0
            )
            table_IR = tl.load(
                table + row[None, :] * num_features + i[:, None], mask=used[None, :] & inside[:, None], other=0.0
            )
            if AS_FP32:
                x_NI = x_NI.to(tl.float32)
                table_IR = table_IR.to(tl.float32)
            total = tl.dot(x_NI, table_IR, total, input_precision="ieee")
        total *= tl.load(weight + group * width + r, mask=used, other=0.0)[None, :]
        tl.store(hidden + token[:, None] * width + r[None, :], total, mask=present[:, None] & used[None, :])


@triton.jit
def expand_group(
    hidden,
    table,
    index,
    count,
    member,
    first,
    y,
    tokens,
    num_features,
    width,
    ADD: tl.constexpr,
    AS_FP32: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Store y[n] = hidden[n], rounded to the table's dtype, @ the group's rank rows (added with ADD) for a token block."""
    group = tl.program_id(0)
    begin = tl.load(first + group)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = n < (tl.load(first + group + 1) - begin) * tokens
    if tl.max(present.to(tl.int32), axis=0) > 0:
        token = tl.load(member + begin + n // tokens, mask=present, other=0).to(tl.int64) * tokens + n % tokens
        o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
        inside = o < num_features
        num_ranks = tl.load(count + group)
        total = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
        for start in range(0, num_ranks, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            used = r < num_ranks
            row = tl.load(index + group * width + r, mask=used, other=0).to(tl.int64)
            hidden_NR = tl.load(
                hidden + token[:, None] * width + r[None, :], mask=present[:, None] & used[None, :], other=0.0
            )
            table_RO = tl.load(
                table + row[:, None] * num_features + o[None, :], mask=used[:, None] & inside[None, :], other=0.0
            )
            hidden_NR = hidden_NR.to(table.dtype.element_ty)
            if AS_FP32:
                hidden_NR = hidden_NR.to(tl.float32)
                table_RO = table_RO.to(tl.float32)
            total = tl.dot(hidden_NR, table_RO, total, input_precision="ieee")
        place = y + token[:, None] * num_features + o[None, :]
        mask = present[:, None] & inside[None, :]
        if ADD:
            total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, total.to(y.dtype.element_ty), mask=mask)
