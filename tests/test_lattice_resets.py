"""A hard reset that meets a write of zero leaves a slot of zeros: every later token finds its first direction there."""

import pytest

torch = pytest.importorskip("torch")

import mixers  # noqa: E402


def call(backend: str, dtype: torch.dtype, device: str, silent: str, **options: object) -> list[torch.Tensor]:
    """Output, state and gradients of 11 tokens; the fourth and, for some slots, the sixth reset and write nothing."""
    generator = torch.Generator().manual_seed(3)
    x = {n: torch.randn(1, 11, 1, d, generator=generator) for n, d in (("q", 5), ("k", 5), ("v", 4))}
    x["beta"] = torch.rand(1, 11, 1, 5, generator=generator)
    x["log_decay"] = -torch.rand(1, 11, 1, generator=generator)
    x["log_decay"][:, [3, 5, 8]] = -torch.inf
    x[silent][:, 3], x["beta"][:, 5, :, :3] = 0, 0
    leaves = {n: a.to(device, dtype).requires_grad_() for n, a in x.items()}
    y, state = mixers.get("lattice", backend=backend, **options)(**leaves)
    loss = (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum() + state.now.sum()
    return [a.detach() for a in (y, state.start, state.now, *torch.autograd.grad(loss, list(leaves.values())))]


@pytest.mark.parametrize(
    ("objective", "silent", "read_norm"),
    [("decoding", "k", True), ("encoding", "beta", False), ("similarity", "v", True)],
)
@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_later_tokens_find_first_directions(backend: str, objective: str, silent: str, read_norm: bool) -> None:
    status = mixers.backend_status()[backend]
    if not status:
        pytest.skip(status.reason)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    given = {"chunk_size": 7, "read_norm": read_norm, "objective": objective}
    truth = call("reference", torch.float64, device, silent, **given)
    for got, wanted in zip(call(backend, torch.float32, device, silent, **given), truth, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
