"""The kernel of cross_entropy over the rows of logits, and how it splits a row: see cross_entropy.py."""

import triton
import triton.language as tl

from .exponential import divide, exp, log
from .rows import Matrix


@triton.jit
def split(ptr, cols, VEC: tl.constexpr):
    """(head, body): of `cols` elements from ptr on, those before the first 16-byte boundary, and the multiple of VEC
    after it."""
    past = ptr.to(tl.int64) // (16 // VEC) % VEC
    # int32 for all cols: the body then keeps a pointer of its own, which carries the hint that it is aligned.
    head = tl.minimum((VEC - past) % VEC, cols).to(tl.int32)
    return head, (cols - head) // VEC * VEC


@triton.jit
def edge_columns(head, body, VEC: tl.constexpr):
    """The columns of head and tail, (2·VEC,); from cols - body on they do not exist."""
    lane = tl.arange(0, 2 * VEC)
    return lane, tl.where(lane < head, lane, lane + body)


@triton.jit
def tile_columns(BLOCK_N: tl.constexpr, VEC: tl.constexpr):
    """The columns of a block, (BLOCK_N/VEC, VEC): a thread's 16-byte accesses are rows of it."""
    group = tl.arange(0, BLOCK_N // VEC) * VEC
    return group, group[:, None] + tl.arange(0, VEC)[None, :]


# ---- elements


@triton.jit
def _weighted(x, w_ptr, col, mask, reference):
    """w (reference - x), where the mask is set, else 0."""
    distance = tl.where(mask, reference - x, 0.0)
    if w_ptr is not None:
        distance *= tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
    return distance


@triton.jit
def _tanh(x, FLOAT32: tl.constexpr):
    u = tl.abs(x)
    e = exp(-2.0 * u, FLOAT32)
    # Below 0.625, where 1 - e cancels, the polynomial of Cephes (tanhf.c), whose error is 1e-7 of the value.
    s = u * u
    p = ((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1
    small = u + u * s * (p * s - 3.33332819422e-1)
    size = tl.where(u < 0.625, small, divide(1.0 - e, 1.0 + e, FLOAT32))
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _capped(x, cap, mask, FLOAT32: tl.constexpr):
    """cap tanh(x / cap), or x where cap is None; -inf outside of the mask."""
    if cap is not None:
        x = tl.where(mask, cap * _tanh(divide(x, cap, FLOAT32), FLOAT32), -float("inf"))
    return x


@triton.jit
def _beaten(x, x_t, before, mask):
    """1 for each logit that is greater than the target's, x_t, or equal and before it; a NaN counts as greater."""
    beaten = tl.where(before, (x < x_t) == 0, (x <= x_t) == 0)
    return tl.where(mask & beaten, 1.0, 0.0)


@triton.jit
def _cap_slope(x, cap, FLOAT32: tl.constexpr):
    """The derivative of _capped, 1 - tanh², from e = exp(-2|x / cap|): 1 - t² would cancel."""
    e = exp(-2.0 * tl.abs(divide(x, cap, FLOAT32)), FLOAT32)
    return divide(4.0 * e, (1.0 + e) * (1.0 + e), FLOAT32)


@triton.jit
def _gradient(e, x, factor, uniform, w_ptr, col, mask, cap, smoothing, FLOAT32: tl.constexpr):
    """(e factor - ε/V w) dy/dx for e = exp(y - maximum), where y is the logit x, capped; without the target's part."""
    dx = e * factor
    if smoothing is not None:
        if w_ptr is not None:
            dx -= uniform * tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
        else:
            dx -= uniform
    if cap is not None:
        dx *= _cap_slope(x, cap, FLOAT32)
    return dx


@triton.jit
def _read(ptr, col, mask, raw_t, t, cap, JUDGES: tl.constexpr):
    """The logits of a block, as they are and capped, -inf outside of the mask; how many beat the target's (JUDGES)."""
    x = tl.load(ptr, mask=mask, other=-float("inf")).to(tl.float32)
    beaten = 0.0
    if JUDGES:
        beaten = tl.sum(_beaten(x, raw_t, col < t, mask))
    return x, _capped(x, cap, mask, ptr.dtype.element_ty == tl.float32), beaten


# ---- a row


@triton.jit
def _sums(
    body_ptr,
    head,
    body,
    w_ptr,
    raw_t,
    t,
    reference,
    smoothing,
    cap,
    JUDGES: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of a row's body, in blocks: (top, sums, distances, beaten). The first two are each access's maximum and Σ exp(x -
    top), the third Σ w (reference - x)."""
    FLOAT32: tl.constexpr = body_ptr.dtype.element_ty == tl.float32
    group, tile = tile_columns(BLOCK_N, VEC)
    top = tl.full((BLOCK_N // VEC,), -3.4028234663852886e38, tl.float32)
    sums = tl.zeros((BLOCK_N // VEC,), tl.float32)
    distances = tl.zeros((BLOCK_N // VEC,), tl.float32)
    beaten = 0.0
    for start in range(0, body, BLOCK_N):
        in_body = (start + group < body)[:, None]
        col = head + start + tile
        _, logit, more = _read(body_ptr + start + tile, col, in_body, raw_t, t, cap, JUDGES)
        if JUDGES:
            beaten += more
        # A maximum for each access: no exchange between threads, at the cost of one more exp an access.
        higher = tl.maximum(top, tl.max(logit, axis=1))
        sums = sums * exp(top - higher, FLOAT32) + tl.sum(exp(logit - higher[:, None], FLOAT32), axis=1)
        top = higher
        if smoothing is not None:
            distances += tl.sum(_weighted(logit, w_ptr, col, in_body, reference), axis=1)
    return top, sums, distances, beaten


@triton.jit
def _put_zeros(dx_row_ptr, dx_body_ptr, body, edge_col, in_edge, VEC: tl.constexpr, BLOCK_N: tl.constexpr):
    group, tile = tile_columns(BLOCK_N, VEC)
    dtype = dx_row_ptr.dtype.element_ty
    tl.store(dx_row_ptr + edge_col, tl.zeros((2 * VEC,), dtype), mask=in_edge)
    zeros = tl.zeros((BLOCK_N // VEC, VEC), dtype)
    for start in range(0, body, BLOCK_N):
        tl.store(dx_body_ptr + start + tile, zeros, mask=(start + group < body)[:, None])


@triton.jit
def _put_gradients(
    dx_body_ptr,
    body_ptr,
    head,
    body,
    maximum,
    factor,
    uniform,
    w_ptr,
    smoothing,
    cap,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of a row's body, block by block from its end, where the logits are still cached."""
    FLOAT32: tl.constexpr = body_ptr.dtype.element_ty == tl.float32
    group, tile = tile_columns(BLOCK_N, VEC)
    blocks = tl.cdiv(body, BLOCK_N)
    for i in range(0, blocks):
        start = (blocks - 1 - i) * BLOCK_N
        in_body = (start + group < body)[:, None]
        raw, logit, _ = _read(body_ptr + start + tile, tile, in_body, 0.0, 0, cap, JUDGES=False)
        e = exp(logit - maximum, FLOAT32)
        d = _gradient(e, raw, factor, uniform, w_ptr, head + start + tile, in_body, cap, smoothing, FLOAT32)
        tl.store(dx_body_ptr + start + tile, d.to(dx_body_ptr.dtype.element_ty), mask=in_body)


@triton.jit
def _put_figures(figures: Matrix, row, z, accuracy):
    if figures is not None:
        tl.store(figures.ptr + row, z)
        tl.store(figures.ptr + figures.stride + row, accuracy)


@triton.jit
def _fwd(
    x: Matrix,
    target_ptr,
    w_ptr,
    w_sum_ptr,
    part_ptr,
    dloss_ptr,
    loss_ptr,
    figures: Matrix,
    dx: Matrix,
    rows,
    cols,
    parts,
    ignore_index: tl.int64,
    smoothing,
    z_loss,
    cap,
    WHOLE: tl.constexpr,
    PARTS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """loss (rows,) and dx. figures (2, rows): z_loss lse², and 1 where the target's logit is the first of the greatest.

    Each may be None: w_ptr and w_sum_ptr, part_ptr (the mean's denominator), dloss_ptr, figures, dx; smoothing, z_loss
    and cap, so that the kernel has no code for them.
    """
    program, count = tl.program_id(0), tl.num_programs(0)
    group, tile = tile_columns(BLOCK_N, VEC)
    JUDGES: tl.constexpr = figures is not None
    FLOAT32: tl.constexpr = x.ptr.dtype.element_ty == tl.float32
    denominator = 1.0
    if part_ptr is not None:
        part = tl.arange(0, PARTS)
        denominator = tl.sum(tl.load(part_ptr + part, mask=part < parts, other=0.0))
    t_next = tl.load(target_ptr + program)
    end, step = rows, count
    if WHOLE:  # the compiler sees a loop of one turn and spends no registers on it
        end, step = program + 1, 1
    for index in range(program, end, step):
        t = t_next
        # Loaded one row ahead: each row would otherwise begin with this latency.
        t_next = tl.load(target_ptr + tl.minimum(index + count, rows - 1))
        row = tl.cast(index, tl.int64)
        row_ptr = x.ptr + row * x.stride
        head, body = split(row_ptr, cols, VEC)
        lane, edge_col = edge_columns(head, body, VEC)
        in_edge = lane < cols - body
        body_ptr = tl.multiple_of(row_ptr + head, 16)
        if dx is not None:
            dx_row_ptr = dx.ptr + row * dx.stride
            dx_body_ptr = tl.multiple_of(dx_row_ptr + head, 16)

        if t == ignore_index:
            tl.store(loss_ptr + row, 0.0)
            _put_figures(figures, row, 0.0, 0.0)
            if dx is not None:
                _put_zeros(dx_row_ptr, dx_body_ptr, body, edge_col, in_edge, VEC, BLOCK_N)
        else:
            is_class = (t >= 0) & (t < cols)
            raw_t = tl.load(row_ptr + t, mask=is_class, other=float("nan")).to(tl.float32)
            x_t = _capped(raw_t, cap, is_class, FLOAT32)
            w_t = 1.0
            w_sum = tl.cast(cols, tl.float32)
            if w_ptr is not None:
                w_t = tl.load(w_ptr + t, mask=is_class, other=0.0).to(tl.float32)
                w_sum = tl.load(w_sum_ptr)

            # Σ exp(x - maximum); of smoothing's Σ w (lse - x), the part Σ w (reference - x)
            reference = tl.where(tl.abs(x_t) < float("inf"), x_t, 0.0)
            raw_edge, edge, beaten = _read(row_ptr + edge_col, edge_col, in_edge, raw_t, t, cap, JUDGES)
            distance = 0.0
            if WHOLE:
                in_body = (group < body)[:, None]
                raw, logit, more = _read(body_ptr + tile, head + tile, in_body, raw_t, t, cap, JUDGES)
                # Not below the least float: the exponentials of a row that is all -inf are then 0.
                maximum = tl.maximum(tl.maximum(tl.max(logit), tl.max(edge)), -3.4028234663852886e38)
                if smoothing is not None:
                    distance = tl.sum(_weighted(logit, w_ptr, head + tile, in_body, reference))
                e = exp(logit - maximum, FLOAT32)
                total = tl.sum(e)
            else:
                top, sums, distances, more = _sums(
                    body_ptr, head, body, w_ptr, raw_t, t, reference, smoothing, cap, JUDGES, VEC, BLOCK_N
                )
                maximum = tl.maximum(tl.max(top), tl.max(edge))
                total = tl.sum(sums * exp(top - maximum, FLOAT32))
                if smoothing is not None:
                    distance = tl.sum(distances)
            if smoothing is not None:
                distance += tl.sum(_weighted(edge, w_ptr, edge_col, in_edge, reference))
            edge_e = exp(edge - maximum, FLOAT32)
            total += tl.sum(edge_e)

            log_total = log(total, FLOAT32)
            lse = maximum + log_total
            one_hot, each = w_t, 0.0
            if smoothing is not None:
                one_hot *= 1.0 - smoothing
                each = divide(smoothing, tl.cast(cols, tl.float32), FLOAT32)
            loss = one_hot * ((maximum - x_t) + log_total)
            if smoothing is not None:
                loss += each * (distance + w_sum * ((maximum - reference) + log_total))
            if z_loss is not None:
                loss += z_loss * lse * lse
            tl.store(loss_ptr + row, tl.where(is_class, loss, float("nan")))
            if JUDGES:
                z = 0.0
                if z_loss is not None:
                    z = z_loss * lse * lse
                first = tl.where(beaten + more == 0.0, 1.0, 0.0)
                nan = float("nan")
                _put_figures(figures, row, tl.where(is_class, z, nan), tl.where(is_class, first, nan))

            if dx is not None:
                scale = tl.where(is_class, 1.0, float("nan")) / denominator
                if dloss_ptr is not None:
                    scale *= tl.load(dloss_ptr + row)
                one_hot *= scale
                uniform = each * scale
                numerator = one_hot + uniform * w_sum
                if z_loss is not None:
                    numerator += 2.0 * scale * z_loss * lse
                factor = divide(numerator, total, FLOAT32)
                dtype = dx.ptr.dtype.element_ty
                tl.debug_barrier()  # every thread has read the edge and the target's element; both are overwritten now
                edge = _gradient(edge_e, raw_edge, factor, uniform, w_ptr, edge_col, in_edge, cap, smoothing, FLOAT32)
                tl.store(dx_row_ptr + edge_col, edge.to(dtype), mask=in_edge)
                if WHOLE:
                    in_body = (group < body)[:, None]
                    d = _gradient(e, raw, factor, uniform, w_ptr, head + tile, in_body, cap, smoothing, FLOAT32)
                    tl.store(dx_body_ptr + tile, d.to(dtype), mask=in_body)
                else:
                    _put_gradients(
                        dx_body_ptr, body_ptr, head, body, maximum, factor, uniform, w_ptr, smoothing, cap, VEC, BLOCK_N
                    )
                tl.debug_barrier()  # the target's element is written again: this write must be the last
                dx_t = exp(x_t - maximum, FLOAT32) * factor - one_hot
                if smoothing is not None:
                    dx_t -= uniform * w_t
                if cap is not None:
                    dx_t *= _cap_slope(raw_t, cap, FLOAT32)
                tl.store(dx_row_ptr + t, dx_t.to(dtype), mask=is_class)
