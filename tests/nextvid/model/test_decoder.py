"""The flow decoder: isolation of tubelets, clips and copies; timesteps; the one input layer; zero start."""

import pytest
import torch
from torch import Tensor

from nextvid.config.recipe import EncoderConfig, ModelConfig
from nextvid.model.decoder import FlowDecoder, Positions, TimeEmbedding, sinusoid
from nextvid.model.encoder import all_ids
from tests.nextvid.model.tiny import CELLS, TUBELETS, tiny_model, tiny_recipe

FRAMES = TUBELETS - 1
COPIES, CLIPS, CHANNELS = 3, 2, 10


def decoder(trained: bool = True) -> FlowDecoder:
    found = tiny_model(tiny_recipe(), trained=trained).decoder
    assert isinstance(found, FlowDecoder)
    return found


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Positions]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(CLIPS, FRAMES * CELLS, 32, generator=generator)
    noisy = torch.randn(COPIES, CLIPS, FRAMES, CELLS, CHANNELS, generator=generator)
    tau = torch.rand(COPIES, CLIPS, FRAMES, generator=generator)
    queries = all_ids(FRAMES, CELLS) + CELLS
    return z, noisy, tau, Positions(queries, queries, FRAMES)


@pytest.mark.parametrize("where", [(0, 0, 0), (2, 1, 2), (1, 0, 1)])
@pytest.mark.parametrize("what", ["noisy", "tau"])
def test_trap_22_a_sequence_is_one_tubelet_of_one_clip_and_copy(where: tuple[int, int, int], what: str) -> None:
    model = decoder()
    z, noisy, tau, positions = inputs()
    before = model(z, noisy, tau, positions)
    if what == "noisy":
        noisy[where] += 1.0
    else:
        tau[where] = 1.0 - tau[where]
    after = model(z, noisy, tau, positions)
    changed = (before != after).flatten(3).any(dim=-1)
    expected = torch.zeros(COPIES, CLIPS, FRAMES, dtype=torch.bool)
    expected[where] = True
    assert torch.equal(changed, expected)


def test_condition_of_a_tubelet_reaches_its_own_copies_only() -> None:
    model = decoder()
    z, noisy, tau, positions = inputs()
    before = model(z, noisy, tau, positions)
    z[1, CELLS : 2 * CELLS] += 1.0
    changed = (before != model(z, noisy, tau, positions)).flatten(3).any(dim=-1)
    assert changed[:, 1, 1].all()
    assert int(changed.sum()) == COPIES


def test_tokens_of_a_tubelet_see_each_other() -> None:
    model = decoder()
    z, noisy, tau, positions = inputs()
    before = model(z, noisy, tau, positions)
    noisy[0, 0, 0, 3] += 1.0
    changed = (before != model(z, noisy, tau, positions))[0, 0, 0].any(dim=-1)
    assert changed.all()


def test_temporal_rotation_cancels_inside_a_tubelet() -> None:
    """Method.md 5: ids of tubelet 1 serve every tubelet."""
    model = decoder()
    z, noisy, tau, positions = inputs()
    later = Positions(positions.query_ids + 7 * CELLS, positions.context_ids, FRAMES)
    assert torch.allclose(model(z, noisy, tau, positions), model(z, noisy, tau, later), atol=1e-5)


def test_own_ids_in_each_clip() -> None:
    """A subset of cells, other ones in each clip: same as running the clips alone."""
    model = decoder()
    z, noisy, tau, _ = inputs()
    ids = torch.tensor([[1, 4, 6], [0, 7, 11]])
    noisy, z = noisy[..., :3, :], z.unflatten(1, (FRAMES, CELLS))[:, :, :3].flatten(1, 2)
    queries = (torch.arange(1, TUBELETS)[None, :, None] * CELLS + ids[:, None]).flatten(1)
    together = model(z, noisy, tau, Positions(queries, queries, FRAMES))
    for row in range(CLIPS):
        own = slice(row, row + 1)
        positions = Positions(queries[own], queries[own], FRAMES)
        assert torch.allclose(together[:, own], model(z[own], noisy[:, own], tau[:, own], positions), atol=1e-5)


def test_zero_start_and_linear_concat() -> None:
    model = decoder(trained=False)
    z, noisy, tau, positions = inputs()
    assert not model(z, noisy, tau, positions).any()
    weight = torch.cat((model.embed_condition.weight, model.embed_noisy.weight), dim=1).detach()
    bound = (6 / sum(weight.shape)) ** 0.5  # Xavier-uniform of the one layer on concatenated channels
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert model.embed_condition.bias is None


def test_linears_behind_a_wide_encoder_start_as_it_does() -> None:
    torch.manual_seed(0)
    model = FlowDecoder(ModelConfig(encoder=EncoderConfig(depth=1, width=512, heads=8)))
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "modulation" not in name and name != "head.out.weight":
            assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05), name


def test_trap_06_a_thousand_timesteps_are_told_apart_under_autocast() -> None:
    torch.manual_seed(0)
    embedding = TimeEmbedding(64)
    tau = torch.arange(1000) / 1000
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, mapped = sinusoid(tau), embedding(tau)
    assert plain.dtype == mapped.dtype == torch.float32
    assert len(torch.unique(plain, dim=0)) == 1000
    assert float(torch.pdist(mapped).min()) > 0


def test_sinusoid_is_on_the_scale_of_0_to_1000() -> None:
    assert torch.allclose(sinusoid(torch.tensor([0.25]))[0, 0], torch.tensor(250.0).cos())
    assert torch.allclose(sinusoid(torch.tensor([0.25]))[0, 128], torch.tensor(250.0).sin())
