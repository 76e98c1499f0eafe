"""Memory of batches: never written while somebody reads it, and used again as soon as nobody does."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextvid.config.project import Project
from nextvid.train.rows import Buffer, Latents, Leased, Ring, Staged
from nextvid.trainset.order import Order
from nextvid.trainset.trainset import Trainset
from storage.reader import RowReader
from tests.nextvid.train.corpus import make_project
from tests.nextvid.train.tiny import ALONE, tiny_recipe


class Copying:
    """A copy to a device that is over when the test says so: what torch.cuda.Event is to a stream."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def synchronize(self) -> None:
        self.over.wait()

    def query(self) -> bool:
        return self.over.is_set()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("ring"))


def test_a_buffer_is_written_again_only_after_its_copy(project: Project) -> None:
    """Fills three batches through two buffers while the `device` has not finished to read the first."""
    trainset, recipe = Trainset.open(project.root), tiny_recipe()
    reader = RowReader(project.root, trainset.spec, trainset.batches)
    rows = Staged(Latents(reader, trainset, 1, ALONE.device), 4 * 4, 2, ALONE.device)
    order = Order(trainset, recipe)
    shares = [order.drawn(4, first, 4) for first in (0, 4, 8)]
    first = rows.memory(4, 4)
    rows.fill(shares[0], first)
    bits = first[1].view(torch.int16)  # what an image leaves unwritten may be NaN
    before = bits.clone()
    copying = Copying()
    rows._ring.give(first[0], cast("torch.cuda.Event", copying))
    second = rows.memory(4, 4)
    rows.fill(shares[1], second)  # no copy out of it yet: at once
    assert second[0] is not first[0]
    third = rows.memory(4, 4)
    assert third[0] is first[0]
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(rows.fill, shares[2], third)
        try:
            with pytest.raises(NotYet):
                filling.result(timeout=0.2)
            assert torch.equal(bits, before)
        finally:
            copying.over.set()
        filling.result(timeout=60)
    assert not torch.equal(bits, before)


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 4))
def test_a_ring_hands_out_each_buffer_once(turns: list[int], buffers: int) -> None:
    ring = Ring(buffers, 8, torch.float16, pinned=False)
    taken: list[Buffer] = []
    for turn in turns:
        if turn % 2 == 0 and len(taken) < buffers:
            taken.append(ring.take())
        elif taken:
            ring.give(taken.pop(turn % len(taken)), None)
        assert len({buffer.memory.data_ptr() for buffer in taken}) == len(taken)
    taken += [ring.take() for _ in range(buffers - len(taken))]  # none was lost
    assert len({buffer.memory.data_ptr() for buffer in taken}) == buffers


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_leased_memory_is_nobody_elses(turns: list[tuple[bool, int]]) -> None:
    """A view of a lease keeps its values as long as it is held; what is let go comes back."""
    memory, most, addresses = Leased(6), 0, set()
    held: list[tuple[int, torch.Tensor]] = []
    for number, (take, which) in enumerate(turns):
        if take:
            lease = memory.take()
            lease.fill_(number)
            addresses.add(lease.data_ptr())
            held.append((number, lease.view(2, 3)[1]))
            del lease
        elif held:
            held.pop(which % len(held))
        most = max(most, len(held))
        assert [view.tolist() for _, view in held] == [[value] * 3 for value, _ in held]
    assert len(addresses) == most  # never more than were held at once


def test_what_a_graph_needs_for_its_gradient_stays() -> None:
    memory = Leased(4)
    weight = torch.ones(4, requires_grad=True)
    lease = memory.take().fill_(3.0)
    address = lease.data_ptr()
    loss = (lease * weight).sum()
    del lease
    gc.collect()
    other = memory.take().fill_(7.0)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0] * 4
    del loss
    assert memory.take().data_ptr() == address != other.data_ptr()


def test_a_place_whose_copy_is_over_is_taken_before_one_that_waits() -> None:
    ring = Ring(3, 8, torch.float16, pinned=False)
    buffers = [ring.take() for _ in range(3)]
    copies = [Copying() for _ in buffers]
    for buffer, copying in zip(buffers, copies, strict=True):
        ring.give(buffer, cast("torch.cuda.Event", copying))
    copies[1].over.set()
    assert [ring.take() for _ in range(3)] == [buffers[1], buffers[0], buffers[2]]


def test_memory_is_used_again() -> None:
    memory = Leased(4)
    address = memory.take().data_ptr()
    assert {memory.take().data_ptr() for _ in range(5)} == {address}
