"""Draw the picture of the title page, book/_static/hero.svg: python workflow/make_hero.py

A variational autoencoder with a latent of two dimensions is trained on MNIST. Its decoded means
are laid out so that equal areas hold equal shares of the prior. Of the first test digits the one
is chosen whose encoder is farthest from the exact posterior, which two dimensions allow to be
computed on a grid. The picture shows the encoder's answer, the posterior, and the chains of
annealed importance sampling, drawn as strongly as they weigh. It takes a few minutes on one core.
"""

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Ellipse
from torch import nn

from amortised.data import load_mnist
from amortised.encoders import GaussianEncoder
from amortised.mcmc import hmc_step
from amortised.models import BernoulliDecoder
from amortised.objectives import elbo
from amortised.plotting import use_style

HERO = Path(__file__).resolve().parents[1] / "book" / "_static" / "hero.svg"
ROWS, COLUMNS, PIXELS = 13, 33, 28
INSET = 4  # side, in cells, of the window at the lower right that shows the observation
CHAIN, ENCODER = "#dd5f1e", "#7b4fd0"
normal = torch.distributions.Normal(0.0, 1.0)


def train(images, epochs=30, batch_size=200, width=256):
    decoder = nn.Sequential(
        nn.Linear(2, width), nn.ELU(), nn.Linear(width, width), nn.ELU(),
        nn.Linear(width, width), nn.ELU(), nn.Linear(width, 784),
    )  # fmt: skip
    trunk = nn.Sequential(nn.Linear(784, width), nn.ELU(), nn.Linear(width, width), nn.ELU())
    model, encoder = BernoulliDecoder(decoder, 2, 784), GaussianEncoder(2, trunk, width)
    optimiser = torch.optim.Adam([*model.parameters(), *encoder.parameters()], 1.5e-3)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size):
            x = torch.bernoulli(images[rows])
            bound = elbo(model, encoder(x), x, analytic_kl=True).mean()
            optimiser.zero_grad()
            (-bound).backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: bound {bound.item():.1f} nats", flush=True)
    return model.requires_grad_(False), encoder.requires_grad_(False)


def lattice(columns, rows):
    """Centres of a grid of equal prior mass: in the unit square, and as latents ``[R, C, 2]``."""
    across, up = ((torch.arange(n) + 0.5) / n for n in (columns, rows))
    u = torch.stack(torch.meshgrid(across, up, indexing="xy"), -1)
    return u, normal.icdf(u)


def posterior_on(latents, model, x):
    """Posterior probability of each cell of a lattice, ``[N, P], [R, C, 2] -> [N, R * C]``."""
    logits = model.logits(latents.reshape(-1, 2))
    log_likelihood = x @ logits.T - nn.functional.softplus(logits).sum(-1)
    return torch.softmax(log_likelihood, -1)  # cells have equal prior mass


def farthest(model, encoder, x):
    """The observation whose encoder is farthest, on the page, from the mode of the posterior."""
    u, latents = lattice(160, 160)
    probability = posterior_on(latents, model, x)
    sharp = probability.topk(40).values.sum(-1) > 0.97
    distance = (normal.cdf(encoder(x).mean) - u.reshape(-1, 2)[probability.argmax(-1)]).norm(dim=-1)
    return int((distance * sharp).argmax())


def anneal(model, x, num_chains=7, num_temperatures=30, num_leapfrog=12):
    """Annealed importance sampling that remembers its way.

    Returns the trajectories ``[temperatures, num_leapfrog + 1, chains, 2]``, which of them were
    accepted ``[temperatures, chains]``, and the log-weights ``[chains]``.
    """
    z, beta_before = model.prior().sample((num_chains,)), 0.0
    ways, accepted, log_weights = [], [], torch.zeros(num_chains)
    for beta in torch.logspace(-2.5, 0, num_temperatures).tolist():
        log_weights += (beta - beta_before) * model.log_likelihood(x, z)
        visited = []

        def target(z, beta=beta, visited=visited):
            visited.append(z.detach())
            return model.prior().log_prob(z) + beta * model.log_likelihood(x, z)

        state, info = hmc_step(z, target, 0.1 / (1 + 40 * beta) ** 0.5, num_leapfrog)
        ways.append(torch.stack(visited))
        accepted.append(info.is_accepted)
        z, beta_before = state.z, beta
    return torch.stack(ways), torch.stack(accepted), log_weights


def hues(z):
    """Colours of equal lightness around the circle: OKLCH with the angle of ``z`` as hue."""
    angle = np.arctan2(z[..., 1], z[..., 0])
    lightness, chroma = 0.64, 0.085
    a, b = chroma * np.cos(angle), chroma * np.sin(angle)
    to_lms = np.array([
        [0.3963377774, 0.2158037573], [-0.1055613458, -0.0638541728], [-0.0894841775, -1.291485548],
    ])  # fmt: skip
    lms = lightness + np.stack([a, b], -1) @ to_lms.T
    to_srgb = np.array([
        [4.0767416621, -3.3077115913, 0.2309699292], [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ])  # fmt: skip
    linear = (lms**3 @ to_srgb.T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def draw(model, encoder, x):
    use_style()
    fig, ax = plt.subplots(figsize=(COLUMNS / 3, ROWS / 3), layout="none")
    ax.set_position((0, 0, 1, 1))
    ax.set_axis_off()

    _, latents = lattice(COLUMNS, ROWS)
    ink = torch.sigmoid(model.logits(latents)).reshape(ROWS, COLUMNS, PIXELS, PIXELS).numpy()
    sheet = np.ones((ROWS, COLUMNS, PIXELS, PIXELS, 4))
    sheet[..., :3] = hues(latents.numpy())[:, :, None, None]
    sheet[..., 3] = 0.75 * ink
    sheet[:INSET, -INSET:, ..., 3] = 0
    sheet = sheet[::-1].transpose(0, 2, 1, 3, 4).reshape(ROWS * PIXELS, COLUMNS * PIXELS, 4)
    ax.imshow(sheet, extent=(0, COLUMNS, 0, ROWS), interpolation="none")

    observed = np.ones((PIXELS, PIXELS, 4))
    observed[..., :3] = to_rgb(CHAIN)
    observed[..., 3] = x.reshape(PIXELS, PIXELS)
    ax.imshow(observed, extent=(COLUMNS - INSET + 0.2, COLUMNS - 0.2, 0.2, INSET - 0.2))

    scale = torch.tensor([COLUMNS, ROWS])
    ways, accepted, log_weights = anneal(model, x)
    strength = 0.2 + 0.8 * (log_weights - log_weights.max()).exp() ** 0.25
    for chain, alpha in enumerate(strength.tolist()):
        kept = normal.cdf(ways[accepted[:, chain], :, chain]) * scale
        ax.plot(*kept.flatten(0, 1).T, color=CHAIN, lw=0.8 + alpha, alpha=alpha)
        ax.plot(*(normal.cdf(ways[0, 0, chain]) * scale), "o", color=CHAIN, ms=6, alpha=alpha)

    fine, latents = lattice(8 * COLUMNS, 8 * ROWS)
    probability = posterior_on(latents, model, x[None])[0]
    ordered = probability.sort(descending=True).values
    levels = [float(ordered[ordered.cumsum(0) < mass][-1]) for mass in (0.99, 0.6)]
    grid = (fine * scale).numpy()
    ax.contourf(
        grid[..., 0], grid[..., 1], probability.reshape(grid.shape[:2]).numpy(),
        levels=[levels[0], levels[1], 1.0], colors=[CHAIN], alpha=0.85,
    )  # fmt: skip

    answer = encoder(x[None])
    centre = (normal.cdf(answer.mean[0]) * scale).tolist()
    slope = normal.log_prob(answer.mean[0]).exp() * scale
    width, height = (4 * answer.stddev[0] * slope).tolist()  # two standard deviations each way
    ax.add_patch(Ellipse(centre, width, height, fill=False, color=ENCODER, lw=2.4))
    ax.set(xlim=(0, COLUMNS), ylim=(0, ROWS))
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", dpi=96, metadata={"Date": None})
    return buffer.getvalue()


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, encoder = train(load_mnist("train").images)
    x = (load_mnist("test").images[:300] > 0.5).float()
    chosen = farthest(model, encoder, x)
    print(f"test image {chosen}")
    HERO.write_bytes(draw(model, encoder, x[chosen]))
    print(f"{HERO}: {HERO.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
