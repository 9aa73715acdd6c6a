"""The kernels for PyTorch."""

import torch
from keras import ops

from keras_moe.kernels import plain
from keras_moe.kernels.plain import flat_index, num_row_shards  # noqa: F401

# Missing in old versions.
HAS_GROUPED_MM = hasattr(torch.nn.functional, "grouped_mm")


def as_size(n):
    return int(n)  # A tensor during ONNX export.


def argsort(x):
    if torch.onnx.is_in_onnx_export():
        # ONNX has no sort; its TopK keeps the order of equal values, too.
        return torch.topk(x, x.shape[-1], largest=False).indices
    return plain.argsort(x)


def gather_rows(x, index):
    groups, n, *width = ops.shape(x)
    index, shape = flat_index(index, n), ops.shape(index)
    x = torch.cat([x.new_zeros((1, *width)), x.reshape(groups * n, *width)])
    return x.index_select(0, index.flatten() + 1).reshape(*shape, *width)


def scatter_add_rows(rows, index, num_rows):
    groups, width = ops.shape(index)[-2], ops.shape(rows)[index.ndim :]
    index = flat_index(index, num_rows).flatten() + 1
    rows = rows.reshape(-1, *width)
    sums = rows.new_zeros((groups * num_rows + 1, *width))
    if torch.onnx.is_in_onnx_export():  # It exports `scatter_add` alone with sums.
        index = index.long().reshape(-1, *[1] * len(width)).expand_as(rows)
        sums = sums.scatter_add(0, index, rows)
    else:
        sums = sums.index_add(0, index, rows)
    return sums[1:].reshape(groups, num_rows, *width)


def split_rows(rows, group_sizes):
    if rows.device.type == "meta":  # Shape inference.
        return [rows, *(rows[:0] for _ in group_sizes)]
    sizes = group_sizes.tolist()
    return rows.split([*sizes, rows.shape[0] - sum(sizes)])


def grouped_dense(rows, kernel, bias, group_sizes):
    if rows.device.type == "meta":
        return rows.new_empty((rows.shape[0], kernel.shape[2]))
    if HAS_GROUPED_MM and rows.device.type == "cuda" and _suits_grouped_mm(kernel):
        return by_grouped_mm(rows, kernel, bias, group_sizes)
    return _GroupedDense.apply(rows, kernel, bias, group_sizes)


def _suits_grouped_mm(kernel):
    """Returns whether it is bfloat16 with rows and columns of multiples of 16 bytes."""
    return kernel.dtype == torch.bfloat16 and all(n % 8 == 0 for n in kernel.shape[1:])


def by_grouped_mm(rows, kernel, bias, group_sizes):
    """`grouped_dense` for GPUs: one kernel launch, without reading the sizes back."""
    ends = group_sizes.cumsum(0, dtype=torch.int32)
    index = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    in_a_group = (index < ends[-1])[:, None]
    # `grouped_mm` and its gradient leave arbitrary values in the remaining rows.
    rows = torch.where(in_a_group, rows, 0)
    result = torch.nn.functional.grouped_mm(rows, kernel, offs=ends)
    if bias is not None:
        group = torch.searchsorted(ends, index, right=True)
        result = result + bias[group.clamp(max=kernel.shape[0] - 1), 0]
    return torch.where(in_a_group, result, 0)


class _GroupedDense(torch.autograd.Function):
    """One matrix product per group, written into its rows of the result."""

    @staticmethod
    def forward(ctx, rows, kernel, bias, group_sizes):
        result = rows.new_empty((rows.shape[0], kernel.shape[2]))
        groups = _slices(group_sizes)
        for i, group in groups:
            x, y = rows[group], result[group]
            if bias is None:
                torch.mm(x, kernel[i], out=y)
            else:
                torch.addmm(bias[i], x, kernel[i], out=y)
        _zero_remaining(result, groups)
        ctx.save_for_backward(rows, kernel)
        ctx.groups, ctx.with_bias = groups, bias is not None
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        rows, kernel = ctx.saved_tensors
        upstream = upstream.contiguous()
        d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        d_kernel, d_bias = torch.empty_like(kernel), None
        if ctx.with_bias:
            d_bias = kernel.new_zeros((kernel.shape[0], 1, kernel.shape[2]))
        for i in set(range(kernel.shape[0])) - {i for i, _ in ctx.groups}:
            d_kernel[i] = 0
        for i, group in ctx.groups:
            x, y = rows[group], upstream[group]
            torch.mm(x.T, y, out=d_kernel[i])
            if ctx.with_bias:
                torch.sum(y, 0, keepdim=True, out=d_bias[i])
            if d_rows is not None:
                torch.mm(y, kernel[i].T, out=d_rows[group])
        if d_rows is not None:
            _zero_remaining(d_rows, ctx.groups)
        return d_rows, d_kernel, d_bias, None


def _slices(group_sizes):
    """Returns the index and the rows of each group that is not empty."""
    groups, start = [], 0
    for i, size in enumerate(group_sizes.tolist()):
        if size:
            groups.append((i, slice(start, start + size)))
        start += size
    return groups


def _zero_remaining(rows, groups):
    rows[groups[-1][1].stop if groups else 0 :] = 0
