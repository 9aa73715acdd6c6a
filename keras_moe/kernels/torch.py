"""The kernels for PyTorch."""

import collections

import torch

from keras_moe.kernels import plain
from keras_moe.kernels import torch_ops as ops
from keras_moe.kernels.plain import (  # noqa: F401
    FrozenMatrices,
    current_scope,
    loss_is_reachable,
    num_row_shards,
    weigh_rows,
)

# Missing in old versions.
HAS_GROUPED_MM = hasattr(torch.nn.functional, "grouped_mm")

# The numbers of a chunk of rows that stays in a processor's cache, 1 MB in float32.
CHUNK = 2**18


def as_size(n):
    return int(n)  # A tensor during ONNX export.


def assign_part(variable, i, part):
    if current_scope() is not None:  # It has a value of its own.
        return plain.assign_part(variable, i, part)
    with torch.no_grad():
        variable.value[i] = torch.as_tensor(part)


def assign_parts(variable, parts):
    with torch.no_grad():
        for i, part in enumerate(parts):
            variable.value[i].copy_(ops.convert_to_tensor(part))


def argsort(x):
    if torch.onnx.is_in_onnx_export():
        # ONNX has no sort; its TopK keeps the order of equal values, too.
        return torch.topk(x, x.shape[-1], largest=False).indices
    return plain.argsort(x)


def top_k(x, k):
    values, indices = [], []
    for i in range(k):
        value, index = x.max(dim=-1)  # The first one of equal values.
        values.append(value)
        indices.append(index.int())
        if i < k - 1:
            x = x.scatter(-1, index[..., None], float("-inf"))
    return torch.stack(values, dim=-1), torch.stack(indices, dim=-1)


def take_elements(x, index):
    return x.gather(-1, index.long())  # ONNX has no `take_along_dim`.


def matmul(x, matrix):
    if matrix.ndim == 2 and matrix.shape[1] < 16:
        # A product of few columns and its gradient take half the time like this.
        return torch.nn.functional.linear(x, matrix.T.contiguous())
    return x @ matrix


def flat_index(index, num_rows):
    if index.shape[-2] == 1 and index.dtype == torch.int32:
        return index
    return plain.flat_index(index, num_rows)


def gather_rows(x, index):
    groups, n, *width = ops.shape(x)
    index, shape = flat_index(index, n), ops.shape(index)
    x, index = x.reshape(groups * n, *width), index.flatten()
    if width and _runs_on_cpu(x):
        rows = _GatheredRows.apply(x, index)
    else:
        x = torch.cat([x.new_zeros((1, *width)), x])
        rows = x.index_select(0, index + 1)
    return rows.reshape(*shape, *width)


class _GatheredRows(torch.autograd.Function):
    """Rows by their index, zeros for -1, without a copy of all rows."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        rows = x.index_select(0, index.clamp(min=0))
        return rows.index_fill_(0, _indices(index < 0), 0)

    @staticmethod
    def backward(ctx, upstream):
        (index,) = ctx.saved_tensors
        return scatter_add_rows(upstream[None], index[None], ctx.num_rows)[0], None


def scatter_add_rows(rows, index, num_rows):
    groups, width = ops.shape(index)[-2], ops.shape(rows)[index.ndim :]
    index = flat_index(index, num_rows).flatten() + 1
    rows = rows.reshape(-1, *width)
    sums = rows.new_zeros((groups * num_rows + 1, *width))
    # ONNX has no other op, and it takes a third of the time on a CPU.
    if torch.onnx.is_in_onnx_export() or (width and rows.device.type == "cpu"):
        index = index.long().reshape(-1, *[1] * len(width)).expand_as(rows)
        sums = sums.scatter_add(0, index, rows)
    else:
        sums = sums.index_add(0, index, rows)
    return sums[1:].reshape(groups, num_rows, *width)


def combine_rows(rows, weight, index, num_rows):
    if _is_traced() or rows.device.type == "meta" or not (rows.numel() and _is_eager()):
        return scatter_add_rows(weigh_rows(rows, weight), index, num_rows)
    groups, width = index.shape[-2], rows.shape[-1]
    index = flat_index(index, num_rows).flatten()
    in_order, order = torch.sort(index, stable=True)
    # The first sum is that of the rows without one.
    sums = torch.arange(-1, groups * num_rows, dtype=index.dtype, device=index.device)
    firsts = torch.searchsorted(in_order, sums)
    rows, weight = rows.reshape(-1, width), weight.flatten()
    sums = _WeightedSums.apply(rows, weight, index, order, firsts)
    return sums.reshape(groups, num_rows, width)


class _WeightedSums(torch.autograd.Function):
    """Sums of weighted rows by their index, without a copy of the weighted rows."""

    @staticmethod
    def forward(ctx, rows, weight, index, order, firsts):
        ctx.save_for_backward(rows, weight, index)
        return _weighted_sums(rows, weight, order, firsts)

    @staticmethod
    def backward(ctx, upstream):
        rows, weight, index = ctx.saved_tensors
        # A second derivative needs ops that have one.
        if torch.is_grad_enabled() or rows.device.type != "cpu":
            upstream = gather_rows(upstream[None], index[None])[0]
            d_rows, d_weight = upstream * weight[:, None], (upstream * rows).sum(-1)
        else:
            d_rows, d_weight = _gradients_in_chunks(rows, weight, index, upstream)
        return d_rows, d_weight, None, None, None


def _gradients_in_chunks(rows, weight, index, upstream):
    """Returns the gradients of rows and weights, of as many at once as fit a cache."""
    d_rows, d_weight = torch.empty_like(rows), torch.empty_like(weight)
    chosen, size = index.clamp(min=0), max(CHUNK // rows.shape[1], 1)
    for start in range(0, rows.shape[0], size):
        chunk = slice(start, start + size)
        part = torch.index_select(upstream, 0, chosen[chunk], out=d_rows[chunk])
        torch.sum(part * rows[chunk], -1, out=d_weight[chunk])
        part.mul_(weight[chunk, None])
    for gradient in (d_rows, d_weight):
        gradient.index_fill_(0, _indices(index < 0), 0)
    return d_rows, d_weight


def _indices(mask):
    return mask.nonzero().flatten()


def _weighted_sums(rows, weight, order, firsts):
    """All sums but the first: of the rows in an order, from one of `firsts` each."""
    options = {"mode": "sum", "per_sample_weights": weight[order]}
    return torch.nn.functional.embedding_bag(order, rows, firsts, **options)[1:]


def sum_over_replicas(x):
    distributed = torch.distributed
    x = x.detach()
    if not (distributed.is_available() and distributed.is_initialized()):
        return x
    if x.device.type != "meta":  # Shape inference.
        x = x.clone()
        distributed.all_reduce(x)
    return x


def split_rows(rows, group_sizes):
    if rows.device.type == "meta":  # Shape inference.
        return [rows, *(rows[:0] for _ in group_sizes)]
    sizes = group_sizes.tolist()
    return rows.split([*sizes, rows.shape[0] - sum(sizes)])


def batched_dense(x, kernel):
    if _is_traced():
        return x @ kernel.make(*kernel.arrays)
    experts, n, hidden = x.shape
    groups = [(i, slice(i * n, (i + 1) * n)) for i in range(experts)]
    result = _FrozenDense.apply(x.reshape(-1, hidden), kernel, None, groups)
    return result.reshape(experts, n, -1)


def grouped_dense(rows, kernel, bias, group_sizes):
    if rows.device.type == "meta":
        return rows.new_empty((rows.shape[0], kernel.shape[2]))
    if torch.compiler.is_compiling():
        return _by_groups(rows, kernel, bias, group_sizes)
    if isinstance(kernel, FrozenMatrices):
        return _FrozenDense.apply(rows, kernel, bias, _slices(group_sizes))
    if HAS_GROUPED_MM and rows.device.type == "cuda" and _suits_grouped_mm(kernel):
        return by_grouped_mm(rows, kernel, bias, group_sizes)
    return _GroupedDense.apply(rows, kernel, bias, _slices(group_sizes))


def _by_groups(rows, kernel, bias, group_sizes):
    """`grouped_dense` for compilers, which know the sizes as symbols only."""
    *groups, remaining = split_rows(rows, group_sizes)
    results = [x @ kernel[i] for i, x in enumerate(groups)]
    if bias is not None:
        results = [y + b for y, b in zip(results, bias, strict=True)]
    zeros = remaining.new_zeros((remaining.shape[0], kernel.shape[2]))
    return torch.cat([*results, zeros])


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
    def forward(ctx, rows, kernel, bias, groups):
        ctx.save_for_backward(rows, kernel)
        ctx.groups, ctx.with_bias = groups, bias is not None
        return _multiply(rows, kernel, bias, groups)

    @staticmethod
    def backward(ctx, upstream):
        (rows, kernel), groups = ctx.saved_tensors, ctx.groups
        upstream, d_rows, d_kernel, d_bias = upstream.contiguous(), None, None, None
        num_groups = kernel.shape[0]
        if ctx.needs_input_grad[0]:
            d_rows = _GroupedDense.apply(upstream, kernel.mT, None, groups)
        if ctx.needs_input_grad[1]:
            d_kernel = _GroupedOuter.apply(rows, upstream, groups, num_groups)
        if ctx.with_bias:
            d_bias = _bias_gradient(upstream, groups, num_groups)
        return d_rows, d_kernel, d_bias, None


class _FrozenDense(torch.autograd.Function):
    """`_GroupedDense` by `FrozenMatrices`."""

    @staticmethod
    def forward(ctx, rows, kernel, bias, groups):
        ctx.kernel, ctx.groups, ctx.with_bias = kernel, groups, bias is not None
        return _multiply(rows, kernel, bias, groups)

    @staticmethod
    def backward(ctx, upstream):
        kernel, groups = ctx.kernel, ctx.groups
        upstream, d_rows, d_bias = upstream.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            d_rows = _FrozenDense.apply(upstream, kernel.transpose(), None, groups)
        if ctx.with_bias:
            d_bias = _bias_gradient(upstream, groups, kernel.shape[0])
        return d_rows, None, d_bias, None


def _multiply(rows, kernel, bias, groups):
    result = rows.new_empty((rows.shape[0], kernel.shape[2]))
    for i, group in groups:
        x, y = rows[group], result[group]
        if bias is None:
            torch.mm(x, kernel[i], out=y)
        else:
            torch.addmm(bias[i], x, kernel[i], out=y)
    result[groups[-1][1].stop if groups else 0 :] = 0
    return result


def _bias_gradient(upstream, groups, num_groups):
    ones = upstream.new_ones((upstream.shape[0], 1))
    return _GroupedOuter.apply(ones, upstream, groups, num_groups)


class _GroupedOuter(torch.autograd.Function):
    """`x.T · y` per group: the gradient of the matrices in `_GroupedDense`."""

    @staticmethod
    def forward(ctx, x, y, groups, num_groups):
        result = x.new_empty((num_groups, x.shape[1], y.shape[1]))
        for i in set(range(num_groups)) - {i for i, _ in groups}:
            result[i] = 0
        for i, group in groups:
            torch.mm(x[group].T, y[group], out=result[i])
        ctx.save_for_backward(x, y)
        ctx.groups = groups
        return result

    @staticmethod
    def backward(ctx, upstream):
        x, y = ctx.saved_tensors
        d_x = _GroupedDense.apply(y, upstream.mT, None, ctx.groups)
        return d_x, _GroupedDense.apply(x, upstream, None, ctx.groups), None, None


def _slices(group_sizes):
    """Returns the index and the rows of each group that is not empty."""
    groups, start = [], 0
    for i, size in enumerate(group_sizes.tolist()):
        if size:
            groups.append((i, slice(start, start + size)))
        start += size
    return groups


def can_assign(old, new):
    # It cannot compile the other call.
    return torch.compiler.is_compiling() or _is_eager()


def _runs_on_cpu(x):
    """Returns whether ops run at once, on a tensor with values on a CPU."""
    on_cpu = x.device.type == "cpu" and x.numel()
    return bool(on_cpu) and _is_eager() and not _is_traced()


def _is_traced():
    """Returns whether the ops become a program, compiled or exported."""
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def _is_eager():
    """Returns whether no transform, such as `vmap` or `grad`, is running."""
    return torch._C._functorch.maybe_current_level() is None


class ForwardPasses:
    first_has_gradient = True

    def __init__(self):
        self._values = collections.deque(maxlen=64)

    def next(self, value=None):
        if torch.compiler.is_compiling():  # It cannot compile the other call.
            return False, value
        if torch._C._current_graph_task_id() != -1:  # Within a backward pass.
            return True, self._values.pop() if self._values else value
        if value is not None:
            self._values.append(value.clone())
        return False, value
