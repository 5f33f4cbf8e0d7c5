"""One backward call whose gradients are added to ``.grad`` together.

Where ``.grad`` is there, autograd adds to it with one kernel per parameter. Where it is not, autograd hands over the
tensor that it computed. So ``.grad`` is set aside during the call, and one ``torch._foreach_add_`` adds to all of them:
the same sums, in the same order, save where a call adds to a leaf more than once, as a reentrant checkpoint does.
"""

from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def parameters_of(modules: Sequence[nn.Module]) -> list[list[Tensor]]:
    """The trained parameters of modules, each once, in groups that can share kernels.

    There are none if a module synchronizes gradients in its backward pass: it may copy a new ``.grad`` into the memory
    of the one that is set aside.
    """
    if any(isinstance(module, DistributedDataParallel) for module in modules):
        return []
    groups: dict[object, list[Tensor]] = {}
    for parameter in dict.fromkeys(p for module in modules for p in module.parameters(recurse=False)):
        if parameter.requires_grad and parameter.is_leaf:
            # a list shares kernels if all strides agree; those of an axis of length 1 may not
            kind = parameter.device, parameter.dtype, 1 in parameter.shape
            groups.setdefault(kind, []).append(parameter)
    return list(groups.values())


def backward(roots: Sequence[tuple[Tensor, Tensor | None]], groups: Iterable[Sequence[Tensor]]) -> None:
    """Run one backward call from all ``(root, gradient)`` that have a graph, and add up gradients in groups of leaves.

    During the call, the ``.grad`` of these leaves holds the gradient of this call alone, save for leaves whose hooks
    run after accumulation. If the call fails, a ``.grad`` that was there is as before.

    Args:
        roots: The gradient of a scalar may be None.
        groups: Leaves; those of a group are added together. A ``.grad`` that is new shares memory with no other, as
            autograd alone does not ensure. Leaves outside the groups accumulate as in any backward call.
    """
    reached = [(root, grad) for root, grad in roots if root.requires_grad]
    if not reached:
        return
    before = [[(leaf, leaf.grad) for leaf in group if not leaf._post_accumulate_grad_hooks] for group in groups]
    aside = [[(leaf, total) for leaf, total in group if _is_plain(total)] for group in before]
    try:
        for group in aside:
            for leaf, _ in group:
                leaf.grad = None
        torch.autograd.backward([root for root, _ in reached], [grad for _, grad in reached])
    finally:
        grads = [[leaf.grad for leaf, _ in group] for group in aside]
        for group in aside:
            for leaf, total in group:
                leaf.grad = total
    with torch.no_grad():
        for group, of_group in zip(aside, grads, strict=True):
            pairs = [(total, grad) for (_, total), grad in zip(group, of_group, strict=True) if grad is not None]
            if pairs:
                torch._foreach_add_([total for total, _ in pairs], [grad for _, grad in pairs])
    _separate([leaf for group in before for leaf, total in group if total is None])


def _separate(leaves: Sequence[Tensor]) -> None:
    """Copy gradients until no two overlap in memory: autograd may hand over two views of one tensor."""
    new = [(leaf.grad, leaf) for leaf in leaves if _is_plain(leaf.grad)]
    end = 0
    for grad, leaf in sorted(new, key=lambda pair: pair[0].data_ptr()):
        start = grad.data_ptr()
        if start < end:
            leaf.grad = grad.clone()
        end = max(end, start + grad.nbytes)


def _is_plain(grad: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a gradient is dense, and of no subclass that knows more than its values."""
    return type(grad) is Tensor and grad.layout is torch.strided
