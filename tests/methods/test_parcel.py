import torch
from torch import Tensor

from methods.parcel import ALIGNMENT, Parcel

CPU = torch.device("cpu")
TENSORS = [
    torch.arange(3),
    torch.tensor([True, False, True]),
    torch.empty(0, dtype=torch.int32),
    torch.tensor([[0.5, -1.0], [2.0, 4.0]], dtype=torch.float64),
    torch.tensor(7, dtype=torch.int32),
]


def filled(tensors: list[Tensor]) -> Parcel:
    parcel = Parcel.like(tensors, CPU)
    for part, tensor in zip(parcel.parts, tensors, strict=True):
        part.copy_(tensor)
    return parcel


def test_one_copy_moves_every_tensor() -> None:
    sent, arrived = filled(TENSORS), Parcel.like(TENSORS, CPU)
    arrived.whole.copy_(sent.whole)
    for part, tensor in zip(arrived.parts, TENSORS, strict=True):
        assert part.dtype == tensor.dtype
        assert torch.equal(part, tensor)


def test_parts_lie_in_the_buffer_at_aligned_addresses_and_apart() -> None:
    parcel = Parcel.like(TENSORS, CPU)
    starts = [part.data_ptr() - parcel.whole.data_ptr() for part in parcel.parts if part.numel()]
    # By hand: 24 bytes, 3, none, 32 and 4, each filled up to a multiple of 16.
    assert ALIGNMENT == 16
    assert starts == [0, 32, 48, 80]
    assert len(parcel.whole) == 96


def test_nothing_takes_no_memory() -> None:
    parcel = Parcel.like([], CPU)
    assert parcel.parts == []
    assert parcel.whole.nbytes == 0
