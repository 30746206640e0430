from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from pretrain.models.visual_tokenizer.codebook import NEVER, Codebook, spherical_kmeans
from pretrain.models.visual_tokenizer.teachers import PixelTeacher
from pretrain.models.visual_tokenizer.vqkd import VQKD
from tests import toy_models
from tests.distributed import run_ranks
from tests.toy_models import VQ

pictures = partial(toy_models.pictures, size=VQ.image_size)


def tiny(**changes) -> VQKD:
    torch.manual_seed(0)
    return VQKD(replace(VQ, **changes))


def codebook(codes: int = VQ.codes, restart_after: int | None = None) -> Codebook:
    return Codebook(codes, VQ.code_dim, decay=VQ.decay, restart_after=restart_after)


def unit(n: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def coloured_blocks(n: int, seed: int = 0) -> torch.Tensor:
    """Pictures of 2 x 2 patches of one colour each, out of many colours."""
    return pictures(n, seed=seed, size=2).repeat_interleave(8, 2).repeat_interleave(8, 3)


def codebook_state(book: Codebook) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in book.named_buffers()}


# ---- one step of the codebook


def test_after_step_equals_a_plain_loop():
    book = codebook()
    before, z = book.vectors.clone(), unit(12)
    book(z.requires_grad_())
    codes = [max(range(16), key=lambda k: float(v @ before[k])) for v in z.detach()]
    want = []
    for k in range(16):
        mine = [v for v, c in zip(z.detach().double(), codes, strict=True) if c == k]
        if not mine:
            want.append(before[k].double())
            continue
        mean = sum(mine) / len(mine)
        moved = 0.99 * before[k].double() + 0.01 * mean / mean.norm()
        want.append(moved / moved.norm())
    book.after_step()
    assert set(codes) != set(range(16)), "the test wants a code without vectors"
    torch.testing.assert_close(book.vectors, torch.stack(want).float(), rtol=0, atol=1e-7)
    used = torch.zeros(16, dtype=torch.bool).index_fill(0, torch.tensor(codes), True)
    assert torch.equal(book.vectors[~used], before[~used]) and torch.equal(book.last_used == 1, used)


def test_accumulation_equals_one_batch_bit_for_bit():
    z, books = unit(64), []
    for parts in (1, 2, 4):
        book = codebook(restart_after=1)
        for part in z.split(64 // parts):
            book(part)
        book.after_step()
        books.append(codebook_state(book))
    for other in books[1:]:
        assert all(torch.equal(books[0][name], other[name]) for name in other)


def test_a_pass_without_training_leaves_no_trace():
    model = tiny(restart_after=5)
    before = codebook_state(model.codebook)
    model.encode(pictures(2))
    model.eval()(pictures(2), torch.zeros(2, 16, 12))
    with torch.no_grad():
        model.train()(pictures(2), torch.zeros(2, 16, 12))
    assert all(torch.equal(before[name], value) for name, value in model.codebook.named_buffers())
    assert not model.codebook.seen


def test_a_dead_code_restarts_where_vectors_are_far_and_off_is_beit_v2():
    near = F.normalize(torch.eye(8)[:1] + 0.01 * unit(50), dim=-1)
    far = F.normalize(-torch.eye(8)[1:2] + 0.01 * unit(2, seed=1), dim=-1)
    for restart_after in (3, None):
        book = codebook(3, restart_after)
        start = F.normalize(torch.stack([torch.eye(8)[0], torch.eye(8)[2] - torch.eye(8)[1], torch.eye(8)[3]]), dim=-1)
        book.vectors.copy_(start)
        for _ in range(2):
            book(near)
            book.after_step()
        assert torch.equal(book.vectors[1:], start[1:]), "too early"
        book(torch.cat([near, far]))  # the far ones are code 1's; code 2 has now been idle for 3 steps
        book.after_step()
        assert not torch.equal(book.vectors[1], start[1]) and book.last_used[2] == NEVER
        if restart_after is None:
            assert torch.equal(book.vectors[2], start[2])
        else:
            assert any(torch.equal(book.vectors[2], vector) for vector in far), "not one of the fifty well served"


def test_vectors_that_are_not_finite_move_nothing():
    """They are those of a step that is skipped; a code in their place would stay one for good."""
    seen, wrong = unit(6, seed=1), torch.full((6, 8), torch.nan)
    alone, beside = codebook(restart_after=1), codebook(restart_after=1)
    for _ in range(3):
        alone(seen), beside(torch.cat([wrong, seen]))
        alone.after_step(), beside.after_step()
    assert torch.equal(beside.vectors, alone.vectors) and torch.equal(beside.restarted, alone.restarted)
    idle, plain = codebook(restart_after=1), codebook()
    for book in (idle, plain):
        before = book.vectors.clone()
        for _ in range(3):
            book(wrong)
            book.after_step()
        assert torch.equal(book.vectors, before) and int(book.steps) == 3 and book.use == 0


def test_codebook_use_counts_a_window():
    book = codebook(4)
    book.vectors.copy_(torch.eye(8)[:4])
    assert book.use == 0
    book(torch.eye(8)[:2])
    book.after_step()
    assert book.use == 0.5
    for _ in range(100):
        book(torch.eye(8)[:1])
        book.after_step()
    assert book.use == 0.25


# ---- k-means


def test_kmeans_finds_the_clusters_and_repeats_itself():
    centres = unit(6, seed=3)
    vectors = F.normalize(
        centres.repeat_interleave(30, 0) + 0.02 * torch.randn(180, 8, generator=torch.Generator().manual_seed(4)),
        dim=-1,
    )
    means, counts = spherical_kmeans(vectors, 24, refill=True)
    again, _ = spherical_kmeans(vectors, 24, refill=True)
    assert torch.equal(means, again) and counts.sum() == 180
    assert (centres @ means.T).max(dim=1).values.min() > 0.999


def test_kmeans_with_fewer_vectors_than_codes():
    means, counts = spherical_kmeans(unit(5), 16, refill=False)
    assert means.shape == (16, 8) and counts.sum() == 5 and torch.isfinite(means).all()


def _train_on_ranks(images: torch.Tensor, targets: torch.Tensor, accumulation: int) -> dict[str, torch.Tensor]:
    """This rank's slice of the global batch; the network itself stays as it is, so that only the codebook moves."""
    from pretrain.distributed import rank, world_size

    model = tiny(restart_after=1)
    mine = slice(rank() * len(images) // world_size(), (rank() + 1) * len(images) // world_size())
    micro = len(images[mine]) // accumulation
    batches = list(zip(images[mine].split(micro), targets[mine].split(micro), strict=True))
    model.start_codebook([image for image, _ in batches])
    start = model.codebook.vectors.clone()
    for _ in range(3):
        for image, target in batches:
            model(image, target)
        model.after_step()
    return codebook_state(model.codebook) | {"start": start}


def test_ranks_and_accumulation_do_not_change_the_codebook():
    images, targets = pictures(8), torch.zeros(8, 16, 12)
    alone = _train_on_ranks(images, targets, accumulation=1)
    two = run_ranks(_train_on_ranks, 2, images, targets, 2)
    assert not torch.equal(alone["start"], alone["vectors"])
    for name, value in alone.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], value, rtol=0, atol=1e-6, msg=name)


# ---- the whole tokenizer


def test_encode_is_the_nearest_code_by_brute_force():
    model = tiny()
    model.start_codebook([pictures(8)])
    images = pictures(5, seed=1)
    z = model.features(images)
    distances = (z[:, :, None] - model.codebook.vectors).square().sum(-1)
    codes = model.encode(images)
    assert codes.dtype == torch.int64 and codes.shape == (5, 16) and len(codes.unique()) > 1
    assert torch.equal(codes, distances.argmin(-1))
    as_floats = images.float() / 127.5 - 1
    assert torch.equal(codes, model.encode(as_floats))
    assert torch.equal(codes[3:4], model.encode(images[3:4]))


def test_straight_through_gradient():
    """The encoder's vector gets the decoder's gradient at the code, plus that of the commitment; the codes get none."""
    model, images, targets = tiny(beta=0.5), pictures(2), torch.randn(2, 16, 12)
    z = model.features(images).detach().requires_grad_()
    model.features = lambda _: z  # type: ignore[method-assign]
    model(images, targets)["loss"].backward()
    quantised = F.embedding(model.encode(images), model.codebook.vectors).requires_grad_()
    F.mse_loss(model.decoder_head(model.decoder(quantised)), targets).backward()
    commit = 0.5 * 2 * (z - quantised).detach() / z.numel()
    assert quantised.grad is not None and commit.abs().sum() > 0
    torch.testing.assert_close(z.grad, quantised.grad + commit, rtol=1e-4, atol=1e-7)
    assert not list(model.codebook.parameters())


def test_losses_are_named_and_add_up():
    model, images, targets = tiny(distill="cosine", beta=2.0), pictures(2), torch.randn(2, 16, 12)
    out = model(images, targets)
    assert set(out) == {"loss", "distill", "commit", "codebook_use"}
    torch.testing.assert_close(out["loss"], out["distill"] + 2 * out["commit"])
    # A cosine does not see how long the teacher's rows are.
    torch.testing.assert_close(model(images, 7 * targets)["distill"], out["distill"])


def test_every_parameter_learns():
    model = tiny()
    model.start_codebook([pictures(4)])
    model(pictures(4), torch.randn(4, 16, 12))["loss"].backward()
    # The decoder is deep enough for its class row to be read.
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bf16_leaves_the_codebook_in_fp32():
    model = tiny(restart_after=2)
    model.start_codebook([pictures(4)])
    vectors = model.codebook.vectors.clone()
    model.bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.codebook.vectors.dtype == torch.float32 and torch.equal(model.codebook.vectors, vectors)
    assert model.codebook.steps.dtype == torch.int64 and model.codebook.started.dtype == torch.bool
    out = model(pictures(4), torch.randn(4, 16, 12))
    out["loss"].backward()
    assert out["loss"].dtype == torch.float32 and model.features(pictures(4)).dtype == torch.float32
    model.after_step()
    assert model.codebook.vectors.dtype == torch.float32
    assert model.half().double().float().codebook.vectors.dtype == torch.float32
    assert model.to("meta").codebook.vectors.device.type == "meta"


def test_the_quantiser_is_fp32_under_autocast():
    model = tiny()
    model.start_codebook([pictures(8)])
    rows = []
    model.encoder.register_forward_hook(lambda _, __, out: rows.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        codes = model.encode(pictures(4, seed=1))
    z = F.normalize(model.encoder_head(rows[-1].float()), dim=-1)
    assert torch.equal(codes, (z @ model.codebook.vectors.T).argmax(-1))


def test_a_loaded_tokenizer_goes_on_where_it_was():
    model = tiny(restart_after=2)
    model.start_codebook([pictures(4)])
    model(pictures(4), torch.zeros(4, 16, 12))
    model.after_step()
    loaded = tiny(restart_after=2)
    loaded.load_state_dict(model.state_dict())
    loaded.start_codebook([pictures(4, seed=9)])  # has started: nothing happens
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), loaded.buffers(), strict=True))
    assert torch.equal(model.encode(pictures(3)), loaded.encode(pictures(3)))


def test_training_on_coloured_blocks():
    """Loss falls, most codes come into use, and a decoded code has its patch's colour."""
    model, teacher = tiny(patch_size=8, codes=64, restart_after=10, decay=0.95), PixelTeacher(8, cells=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.start_codebook([coloured_blocks(64)])
    losses, uses = [], []
    for step in range(80):
        images = coloured_blocks(64, seed=step)
        out = model(images, teacher(images))
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        losses.append(out["distill"].item())
        uses.append(model.codebook.use.item())
    assert sum(losses[-10:]) / 10 < 0.25 * losses[0]
    assert uses[-1] > 0.5
    images = coloured_blocks(32, seed=1000)
    decoded = teacher.picture(model.decode_codes(model.encode(images)))
    assert decoded.shape == (32, 3, 4, 4)
    error = (decoded.float() - images[:, :, ::4, ::4].float()).square().mean()
    assert error < 0.3 * images.float().var()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"codes": 0}, "codes=0"),
        ({"heads": 5}, "use dim=35"),
        ({"image_size": 18}, "use image_size=20"),
        ({"distill": "l1"}, "distill='l1'"),
        ({"decay": 1.0}, r"decay=1\.0"),
        ({"beta": -1.0}, r"beta=-1\.0"),
        ({"restart_after": 0}, "use None"),
        ({"decoder_depth": -1}, "decoder_depth=-1"),
    ],
)
def test_config_says_what_is_wrong(changes, says):
    with pytest.raises(ValueError, match=says):
        replace(VQ, **changes)


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[N, 3, 16, 16\].*not \[2, 3, 20, 20\]"):
        tiny().encode(pictures(2, size=20))
