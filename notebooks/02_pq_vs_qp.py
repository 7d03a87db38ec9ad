# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # pq versus qp
#
# *What the direction of the divergence does to amortised inference.*
# Runs in under a minute on two cores; needs the evidence lower bound and reparameterisation.
#
# An encoder $q_\phi(z \mid x)$ is one network that answers every inference question at once.
# To train it we need a distance to the posterior, and the natural distance is not symmetric.
# This chapter follows a note of {cite:t}`le2017note` through four models whose posteriors are known exactly.
# So nothing here is a matter of taste: each encoder is set beside the best one its loss could have found.
#
# ```{admonition} What you will be able to do
# :class: tip
# - Derive the two losses, and say which one needs a density, a reparameterisation, a simulator or real data.
# - Predict what each loss does when the family is too small, and check the prediction against exact optima.
# - Train through a discrete variable in four ways, and rank their gradients by variance.
# - Amortise a program whose number of latent variables is itself random.
# - Say why more particles hurt one encoder and help another, and what each loss does to a model that is wrong.
# ```

# %% tags=["parameters"]
seed: int = 0  # seed of every random stream in the chapter
num_seeds: int = 3  # encoders trained side by side from different starting points
num_steps: int = 1500  # optimiser steps for each loss
batch_size: int = 200  # observations in a step, for each seed
num_draws: int = 20_000  # Monte Carlo draws behind each measured mean and variance

# %%
from amortised import checks

checks.parameters(
    globals(),
    seed=checks.integer(minimum=0),
    num_seeds=checks.integer(minimum=1, maximum=20),
    num_steps=checks.integer(minimum=10),
    batch_size=checks.integer(minimum=10),
    num_draws=checks.integer(minimum=1000),
)

# %%
import copy
import math
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    kl_divergence,
)  # fmt: skip
from torch.nn.functional import logsigmoid

from amortised import objectives, plotting
from amortised.models import GaussianMixture, LinearGaussian
from amortised.numerics import effective_sample_size
from amortised.results import markdown_table

torch.manual_seed(seed)
plotting.use_style()
EXACT, PQ, QP = (plotting.COLOURS[name] for name in ("exact", "bound", "approximation"))

# %% [markdown]
# ## Two losses from one frame
#
# Amortised inference asks for one map from observations to distributions that is good on average:
#
# $$
# J(\phi) = \int f(x)\, \operatorname{div}\bigl(p(\cdot \mid x),\, q_\phi(\cdot \mid x)\bigr)\, dx,
# \qquad f(x) = w(x)\, \pi(x).
# $$ (eq-pq-frame)
#
# Here $\pi$ is the density from which we draw observations, and $w \ge 0$ says where accuracy matters.
# The note does not spell out the two factors; this is how we read them.
# Two choices remain open, the divergence and $f$, and both will turn out to matter.
# For now let $w = 1$ and let $\pi$ be the marginal $p(x)$ of the model.
#
# **Reverse divergence: the qp loss.**
# Put $\operatorname{KL}(q \,\|\, p)$ into {eq}`eq-pq-frame` and add $-\log p_\theta(x)$, which does not depend on $\phi$:
#
# $$
# \begin{aligned}
# \ell_{qp}(x) &= \operatorname{KL}\bigl(q_\phi(\cdot \mid x) \,\|\, p_\theta(\cdot \mid x)\bigr) - \log p_\theta(x) \\
# &= \mathbb{E}_{q_\phi(z \mid x)}\bigl[\log q_\phi(z \mid x) - \log p_\theta(x, z)\bigr] = -\mathcal{L}(x).
# \end{aligned}
# $$ (eq-pq-qp)
#
# It is the negative evidence lower bound of {cite:t}`kingma2014vae`.
# The unknown posterior is gone, and the added term makes it a loss for $\theta$ as well.
# The price is an expectation under the very distribution that we differentiate.
# With $z = g_\phi(\varepsilon, x)$ the gradient goes through the draw:
#
# $$
# \nabla_\phi \ell_{qp}(x) = \mathbb{E}_{\varepsilon}\bigl[\nabla_\phi \bigl(\log q_\phi(z \mid x)
# - \log p_\theta(x, z)\bigr)\bigr|_{z = g_\phi(\varepsilon, x)}\bigr].
# $$ (eq-pq-qp-gradient)
#
# **Forward divergence: the pq loss.**
# Swap the arguments. Now the expectation is under the model, and the posterior would be needed to draw from:
#
# $$
# \begin{aligned}
# \mathbb{E}_{p(x)} \operatorname{KL}\bigl(p(\cdot \mid x) \,\|\, q_\phi(\cdot \mid x)\bigr)
# &= \mathbb{E}_{p(x)}\, \mathbb{E}_{p(z \mid x)}\bigl[\log p(z \mid x) - \log q_\phi(z \mid x)\bigr] \\
# &= \mathbb{E}_{p(x, z)}\bigl[-\log q_\phi(z \mid x)\bigr] - \mathrm{H}[z \mid x].
# \end{aligned}
# $$ (eq-pq-pq)
#
# But drawing $x$ and then $z$ from the posterior is the same as drawing $z$ and then $x$ from the model.
# The average over $x$, which looked like a burden, is what makes the loss computable:
#
# $$
# \nabla_\phi\, \mathbb{E}_{p(x, z)}\bigl[\ell_{pq}(x, z)\bigr]
# = \mathbb{E}_{p(x, z)}\bigl[-\nabla_\phi \log q_\phi(z \mid x)\bigr].
# $$ (eq-pq-pq-gradient)
#
# This is maximum likelihood on pairs that we simulate ourselves.
# It goes by the names of sleep phase {cite:p}`hinton1995wakesleep`, inference compilation {cite:p}`le2017compilation`
# and neural posterior estimation {cite:p}`cranmer2020sbi`.
#
# ```{table} What each loss asks for
# :name: tab-pq-needs
#
# | | qp | pq |
# |:--|:--|:--|
# | divergence | $\operatorname{KL}(q \,\Vert\, p)$, reverse | $\operatorname{KL}(p \,\Vert\, q)$, forward |
# | draws | $x$ from data or model, $z$ from $q$ | $(z, x)$ from the model |
# | density $p_\theta(x, z)$ | needed, with its gradient in $z$ | not needed: a simulator will do |
# | gradient through draws of $z$ | needed; discrete $z$ is a problem | not needed; any $z$ will do |
# | learns $\theta$ | yes | no: its draws are data, and the graph is cut |
# | sees real observations | yes | never |
# ```
#
# Both fit in a line of code, `qp_loss(model, q, x)` and `pq_loss(encoder, x, z)`.
# The second takes the encoder and not its output, so that it can cut the graph at both draws.
# First the known answer. With $z \sim \mathcal{N}(0, 1)$ and $x \mid z \sim \mathcal{N}(z, 1)$ the posterior is $\mathcal{N}(x/2, 1/2)$.
# Used as the encoder, it brings both divergences to zero and leaves an entropy: of $p(x)$ for qp, of the posterior for pq.

# %%
# NBVAL_CHECK_OUTPUT
unknown_mean = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0).requires_grad_(False)
x, z = unknown_mean.sample(num_draws)
loss_qp = objectives.qp_loss(unknown_mean, unknown_mean.posterior(x), x)
loss_pq = objectives.pq_loss(unknown_mean.posterior, x, z)

for name, loss, variance in (("qp", loss_qp, 2.0), ("pq", loss_pq, 0.5)):
    entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
    standard_error = loss.std() / num_draws**0.5
    print(f"{name}: entropy {entropy:.4f} nats; ", end="")
    checks.within_error(loss.mean(), entropy, standard_error, label="the mean loss")

# %% [markdown]
# ## The two directions, in motion
#
# What if no member of the family is exact?
# Take a latent with two clusters, $z \sim \tfrac12 \mathcal{N}(-5, 1) + \tfrac12 \mathcal{N}(5, 1)$, seen through heavy noise, $x \mid z \sim \mathcal{N}(z, 10^2)$.
# The posterior is again a mixture of two Gaussians, and `GaussianMixture.posterior` returns it.
# We observe $x = 10$ and let a single Gaussian walk downhill on each divergence.
# In one dimension both integrals are sums over a grid, so no noise disturbs the walk.

# %%
mixture = GaussianMixture(torch.ones(2), torch.tensor([-5.0, 5.0]), torch.ones(2), 10.0)
mixture.requires_grad_(False)
z_grid = torch.linspace(-30, 30, 601).unsqueeze(-1)  # [G, 1]


def divergences(q, x):
    """KL(p || q) and KL(q || p) for q of batch shape [..., B] and x [B, 1], by the trapezoid rule."""
    z = z_grid.reshape(-1, *[1] * len(q.batch_shape), 1)
    log_p, log_q = mixture.posterior(x).log_prob(z), q.log_prob(z)
    step = z_grid[1, 0] - z_grid[0, 0]
    return [(a.exp() * (a - b)).sum(0) * step for a, b in ((log_p, log_q), (log_q, log_p))]


# %%
starts = torch.tensor([[0.0, 5.0], [0.0, 5.0], [-3.0, 3.0]])  # mean and scale of pq, qp, qp
walkers = torch.stack([starts[:, 0], starts[:, 1].log()], -1).requires_grad_()
descent, path, x_shown = torch.optim.Adam([walkers], lr=0.05), [], torch.tensor([[10.0]])
for _ in range(200):
    q = Independent(Normal(walkers[:, :1], walkers[:, 1:].exp()), 1)
    pq, qp = divergences(q, x_shown.expand(3, 1))
    path.append(torch.stack([walkers[:, 0], walkers[:, 1].exp(), pq, qp], -1).detach())
    descent.zero_grad()
    (pq[0] + qp[1:].sum()).backward()
    descent.step()
path = torch.stack(path)  # [steps, walkers, (mean, scale, pq, qp)]
markdown_table(
    ["walker", "mean", "scale", "KL(p‖q)", "KL(q‖p)"],
    [[n, *path[-1, i].tolist()] for i, n in enumerate(("pq", "qp", "qp from the left"))],
    decimals=3,
)

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-motion", "caption": "One Gaussian walks downhill on each divergence to the same posterior at $x = 10$ (filled). Left: the densities. Right: their mean and scale; the whole paths are faint. pq spreads over both modes; qp closes in on one, and where it starts decides which. The last frames are the states in the table above."}, "image": {"alt": "Animation. A wide Gaussian stays wide under the forward divergence and covers both peaks; under the reverse divergence it shrinks onto the higher right peak; a third one, started on the left, shrinks onto the lower left peak."}}
posterior_shown = mixture.posterior(x_shown).log_prob(z_grid).exp()
walker_styles = ((PQ, "-", "pq"), (QP, "-", "qp"), (QP, ":", "qp from the left"))


def draw(figure, frame):
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.fill_between(z_grid[:, 0], posterior_shown, color=EXACT, alpha=0.35, lw=0)
    for (colour, line, label), walk in zip(walker_styles, path[::5].unbind(1), strict=True):
        mean, scale = walk[frame, :2]
        left.plot(z_grid, Normal(mean, scale).log_prob(z_grid).exp(), color=colour, ls=line)
        right.plot(walk[:, 0], walk[:, 1], color=colour, lw=0.8, alpha=0.4)
        right.plot(walk[: frame + 1, 0], walk[: frame + 1, 1], color=colour, ls=line, label=label)
        right.plot(*walk[frame, :2], "o", color=colour, ms=5)
    left.set(xlim=(-15, 15), ylim=(0, 0.42), xlabel="$z$", ylabel="density")
    right.set(xlim=(-7, 7), ylim=(0, 6), xlabel="mean $\\mu$", ylabel="scale $\\sigma$")
    right.legend(loc="lower center", fontsize=8)


plotting.animate(
    draw, len(path[::5]), size=(6.4, 3.0), dpi=110, alt="q moves under each divergence"
)

# %% [markdown]
# The rule is visible in the integrands.
# $\operatorname{KL}(p \,\|\, q)$ averages $\log p - \log q$ under $p$: wherever the posterior has mass, $q$ must have some too. It *covers*.
# $\operatorname{KL}(q \,\|\, p)$ averages $\log q - \log p$ under $q$: wherever the posterior has none, $q$ must have none. It *seeks* a mode,
# and the other mode is a local optimum. For a Gaussian $q$ the covering optimum is the Gaussian with the posterior's mean and variance {cite:p}`minka2005divergence`.
#
# (sec-pq-affine)=
# ## Example 1: a Gaussian with unknown mean
#
# We start where both losses must agree.
# For $z \sim \mathcal{N}(\mu_0, \sigma_0^2)$, $x \mid z \sim \mathcal{N}(z, \sigma^2)$ take $q_\phi(z \mid x) = \mathcal{N}(z;\, ax + b,\, c^2)$.
# The posterior is in this family, at
#
# $$
# a^* = \frac{1/\sigma^2}{1/\sigma_0^2 + 1/\sigma^2}, \quad
# b^* = \frac{\mu_0/\sigma_0^2}{1/\sigma_0^2 + 1/\sigma^2}, \quad
# c^* = \sqrt{\frac{1}{1/\sigma_0^2 + 1/\sigma^2}}.
# $$ (eq-pq-gaussian)
#
# The note prints $c^*$ without the square root. That is the posterior *variance*, while its encoder uses $c$ as a standard deviation.
# With $\mu_0 = 0$ and $\sigma_0 = \sigma = 1$ the difference is $c^* = \sqrt{1/2}$ against $1/2$.
#
# All seeds train together: a leading dimension of size `num_seeds` runs through parameters and data, and the losses add up without touching each other.


# %%
def fit(loss_fn, parameters, step_size=0.01):
    """Minimise by Adam with a cosine schedule; ``loss_fn()`` returns ``[num_seeds, B]``."""
    optimiser = torch.optim.Adam(list(parameters), lr=step_size, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    for _ in range(num_steps):
        optimiser.zero_grad()
        loss_fn().mean(-1).sum().backward()  # the seeds share nothing
        optimiser.step()
        schedule.step()


def simulate(model, num=batch_size):
    """Observations and latents of the model, ``[num_seeds, num, 1]`` each."""
    return [draws.unflatten(0, (num_seeds, num)) for draws in model.sample(num_seeds * num)]


def claim(statement, holds):
    """Assert a statement about trained encoders; in a run too short to train, only report it."""
    assert holds or num_steps < 1000, statement
    print("✓" if holds else "✗", statement)


# %%
class AffineEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi = nn.Parameter(torch.randn(num_seeds, 3))  # a, b, log c

    def forward(self, x):
        a, b, log_c = self.phi.unsqueeze(1).split(1, dim=-1)  # [S, 1, 1] each
        return Independent(Normal(a * x + b, log_c.exp().expand_as(x)), 1)


affine = {"pq": AffineEncoder(), "qp": AffineEncoder()}
affine["qp"].load_state_dict(affine["pq"].state_dict())  # the same starting points
history = {"pq": [], "qp": []}


# %%
def affine_loss(name):
    encoder, (x, z) = affine[name], simulate(unknown_mean)
    history[name].append(encoder.phi.detach().clone())
    if name == "pq":
        return objectives.pq_loss(encoder, x, z)
    return objectives.qp_loss(unknown_mean, encoder(x), x)


fit(lambda: affine_loss("pq"), affine["pq"].parameters(), step_size=0.05)
fit(lambda: affine_loss("qp"), affine["qp"].parameters(), step_size=0.05)

# %%
optimum = torch.tensor([0.5, 0.0, math.sqrt(0.5)])
learned = {n: torch.cat([e.phi[:, :2], e.phi[:, 2:].exp()], -1).detach() for n, e in affine.items()}
errors = {name: (value - optimum).abs().amax(0) for name, value in learned.items()}
columns = [optimum, learned["pq"].mean(0), errors["pq"], learned["qp"].mean(0), errors["qp"]]
markdown_table(
    [
        "parameter",
        "optimum",
        "pq, mean of seeds",
        "largest error",
        "qp, mean of seeds",
        "largest error",
    ],
    [[f"${n}$", *(float(column[i]) for column in columns)] for i, n in enumerate("abc")],
    decimals=4,
)

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-affine", "caption": "Example 1: the three encoder parameters and the excess of each expected loss over its minimum (exact, from the parameters) during training, one thin line for each seed; the optimum {eq}`eq-pq-gaussian` is dotted. In the panel of $c$ the faint dotted line is the value that the note prints for $c^*$."}, "image": {"alt": "Four panels against the training step. The traces of a, b and c of both losses from all seeds run together onto the dotted optimum; c settles at 0.71, well above the printed 0.5. The excess losses fall from about one to below one thousandth of a nat."}}
figure, axes = plt.subplots(1, 4, figsize=(7.6, 2.5))
for name, colour, line in (("pq", PQ, "-"), ("qp", QP, "--")):
    a, b, c = torch.stack(history[name]).unbind(-1)
    c, offset = c.exp(), 2 * (a - 0.5) ** 2 + b**2  # mean squared error of the mean, x ~ N(0, 2)
    r = c / optimum[2] if name == "qp" else optimum[2] / c
    excess = (r**2 - 1) / 2 - r.log() + offset / (2 * c**2 if name == "pq" else 1.0)
    for ax, trace in zip(axes, (a, b, c, excess), strict=True):
        ax.plot(trace, color=colour, ls=line, lw=1)
    axes[0].plot([], [], color=colour, ls=line, label=name)
for ax, target in zip(axes, optimum, strict=False):
    ax.axhline(target, **plotting.LINES["reference"])
axes[2].axhline(0.5, **plotting.LINES["reference"] | {"alpha": 0.5})
for ax, title in zip(axes, ("$a$", "$b$", "$c$", "excess loss (nats)"), strict=True):
    ax.set(title=title, xlabel="step", xlim=(-0.02 * num_steps, 0.4 * num_steps))
axes[0].legend(fontsize=8)
axes[3].set_yscale("log")
plt.show()

# %% [markdown]
# Every seed and both losses find the corrected value. What would the slip have cost?
# With $r = c / c^*$ the two divergences between Gaussians of equal mean are $-\log r + (r^2 - 1)/2$ and $\log r + (r^{-2} - 1)/2$.

# %%
# NBVAL_CHECK_OUTPUT
worst = max(float(error.max()) for error in errors.values())
claim("both losses recover a, b and c to 0.02, for every seed", worst < 0.02)
right, slip = Normal(0.0, math.sqrt(0.5)), Normal(0.0, 0.5)
print(f"stopping at c = 0.5 costs {kl_divergence(slip, right):.4f} nats of qp loss")
print(f"                      and {kl_divergence(right, slip):.4f} nats of pq loss")

# %% [markdown]
# A $q$ that is too narrow is punished more by the loss that wants everything covered.
#
# (sec-pq-mixture)=
# ## Example 2: a mixture, and a family that is too small
#
# Back to the two clusters, now for all $x$ at once.
# Two networks give $q_\phi(z \mid x) = \mathcal{N}\bigl(z;\, m_\phi(x),\, s_\phi(x)^2\bigr)$; the note calls them $\eta^1$ and $\eta^2$, and its second output is the variance $s^2$.
# The exact optimum of each loss is known for every $x$. With $P_c(x) = P(c \mid x)$ and component posteriors $\mathcal{N}(\mu_c(x), \tfrac{100}{101})$, $\mu_c(x) = (100 \mu_c + x) / 101$:
#
# $$
# \begin{aligned}
# \text{pq:} \quad & m = \mathbb{E}[z \mid x], \qquad s^2 = \operatorname{Var}[z \mid x]; \\
# \text{qp:} \quad & m \approx \mu_{c^*}(x),\; c^* = \operatorname{arg\,max}_c P_c(x), \qquad s^2 \approx \tfrac{100}{101},
# \end{aligned}
# $$ (eq-pq-optima)
#
# and qp is left with a divergence of about $-\log \max_c P_c(x)$, the mass that it does not know about.
# The approximation is good because the clusters are ten standard deviations apart.


# %%
class Networks(nn.Module):
    """``num_seeds`` independent tanh networks, evaluated in one batched product."""

    def __init__(self, *sizes):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(sizes):
            for parameters, rows in ((self.weights, inputs), (self.biases, 1)):
                uniform = 2 * torch.rand(num_seeds, rows, outputs) - 1
                parameters.append(uniform / inputs**0.5)

    def forward(self, x):  # [S, B, inputs] -> [S, B, outputs]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.tanh() if layer else x, weight)
        return x


class GaussianNetworks(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = Networks(1, 16, 16, 2)

    def forward(self, x):
        mean, log_scale = self.network(x).chunk(2, dim=-1)
        return Independent(Normal(10 * mean, 10 * log_scale.exp()), 1)


# %%
def pq_mixture(encoder):
    return objectives.pq_loss(encoder, *simulate(mixture))


def qp_mixture(encoder):
    x, _ = simulate(mixture)
    return objectives.qp_loss(mixture, encoder(x), x)


cover, seek = GaussianNetworks(), GaussianNetworks()
fit(lambda: pq_mixture(cover), cover.parameters())
fit(lambda: qp_mixture(seek), seek.parameters(), step_size=0.005)
warm = copy.deepcopy(cover)  # qp once more, started from the encoder that pq has trained
fit(lambda: qp_mixture(warm), warm.parameters(), step_size=0.005)

# %% [markdown]
# We trained qp twice, for a reason that the average losses make plain.
# The table gives the divergences averaged over $p(x)$, by quadrature, beside the best that a Gaussian can do.

# %%
x_grid = torch.linspace(-60, 60, 1201).unsqueeze(-1)
density = mixture.log_evidence(x_grid).exp()
density /= density.sum()
exact = mixture.posterior(x_grid)


def best_gaussians(x):
    """The optimum of each loss, pq and qp, among Gaussians for each x alone."""
    exact = mixture.posterior(x)
    mode = exact.component_distribution
    larger = exact.mixture_distribution.probs.argmax(-1)[:, None, None]
    yield Independent(Normal(exact.mean, exact.stddev), 1)
    yield Independent(Normal(*(v.gather(1, larger)[:, 0] for v in (mode.mean, mode.stddev))), 1)


@torch.no_grad()
def at(encoder, x):
    """The encoders of all seeds at observations ``[B, 1]``."""
    return encoder(x.expand(num_seeds, -1, 1))


# %%
rows = {
    "pq": at(cover, x_grid),
    "qp, random start": at(seek, x_grid),
    "qp, started from pq": at(warm, x_grid),
    **dict(zip(("optimum of pq", "optimum of qp"), best_gaussians(x_grid), strict=True)),
}
scores = {
    name: [(density * kl).sum(-1).flatten() for kl in divergences(q, x_grid)]
    for name, q in rows.items()
}
markdown_table(
    ["encoder", "mean KL(p‖q) of each seed", "mean KL(q‖p) of each seed"],
    [[n, *(", ".join(f"{v:.3f}" for v in kl) for kl in score)] for n, score in scores.items()],
)

# %% [markdown]
# Read the first and the fourth row: pq reaches its optimum with every seed.
# Read the columns: each loss buys its own divergence and pays with the other one, many times over.
# Read the second row: from a random start, qp may end far above its optimum.
# Whatever mode $q$ is in when it has become narrow, it keeps, and a network that has learned one mode for some $x$ offers it to all.
# This local optimum belongs to amortisation; no single observation has it.
# The remedy is to arrive from the covering side. The pq encoder is wide and centred on the posterior mean, which has the sign of the larger mode;
# from there qp closes in on the right one, and only near $x = 0$, where it matters least, does the choice depend on the seed.

# %%
# NBVAL_CHECK_OUTPUT
excess_pq = scores["pq"][0] - scores["optimum of pq"][0]
excess_warm = scores["qp, started from pq"][1] - scores["optimum of qp"][1]
claim("pq is within 0.02 nats of its optimum, for every seed", excess_pq.max() < 0.02)
claim("qp started from pq is within 0.1 nats of its own", excess_warm.max() < 0.1)
claim(
    "pq has the larger reverse, qp the larger forward divergence",
    bool((scores["pq"][1] > 3).all() and (scores["qp, started from pq"][0] > 10).all()),
)

# %%
x_test = torch.tensor([0.0, 5.0, 10.0, 20.0, 30.0, 50.0, 80.0]).unsqueeze(-1)


def compare(encoder, optimum, x):
    """Rows: x, then optimum, mean over seeds and largest error, for mean and scale."""
    q = at(encoder, x)
    pairs = [(optimum.mean.abs(), q.mean.abs()), (optimum.stddev, q.stddev)]
    columns = [c for o, v in pairs for c in (o, v.mean(0), (v - o).abs().amax(0))]
    return torch.cat([x, *columns], -1).tolist()


best_pq, best_qp = best_gaussians(x_test)
titles = ["mean", "learned", "error", "scale", "learned", "error"]
markdown_table(["pq: x", *titles], compare(cover, best_pq, x_test), decimals=3)

# %%
markdown_table(["qp: x", *titles], compare(warm, best_qp, x_test), decimals=3)

# %% [markdown]
# (Optimum, mean over seeds, and the largest error of any seed; of the mean we show the absolute value, because at $x = 0$ the two modes tie.)
# The densities behind the rows:

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-posteriors", "caption": "Example 2: exact posterior (filled) and the learned Gaussians of every seed at five observations. pq covers, qp seeks. At $x = 50$ the posterior has only one mode left, and pq is still too wide."}, "image": {"alt": "Five panels for x from 0 to 50. The posterior goes from two equal peaks to one. The pq Gaussians are wide and centred between the peaks; the qp Gaussians sit on the larger peak. In the last panel the pq Gaussian is about twice as wide as the single peak."}}
figure, axes = plt.subplots(1, 5, figsize=(7.6, 2.4), sharey=True)
for ax, x in zip(axes, (0.0, 5.0, 10.0, 20.0, 50.0), strict=True):
    x = torch.full((1, 1), x)
    ax.fill_between(
        z_grid[:, 0], mixture.posterior(x).log_prob(z_grid).exp(), color=EXACT, alpha=0.35, lw=0
    )
    for encoder, colour, line in ((cover, PQ, "-"), (warm, QP, "--")):
        q = at(encoder, x)
        ax.plot(
            z_grid, q.log_prob(z_grid[:, None, None]).exp()[..., 0], color=colour, ls=line, lw=1
        )
    ax.set(xlim=(-15, 15), xlabel="$z$", title=f"$x = {x.item():g}$")
axes[0].set(ylabel="density", ylim=(0, 0.45))
axes[0].plot([], [], color=PQ, lw=1, label="pq")
axes[0].plot([], [], color=QP, ls="--", lw=1, label="qp")
axes[0].legend(fontsize=8)
plt.show()

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-outputs", "caption": "Example 2: the two network outputs against $x$, for every seed, beside the exact optimum {eq}`eq-pq-optima` of each loss (wide pale lines). Shaded: the density of the training observations. Where there are none, the pq scale does not follow its optimum."}, "image": {"alt": "Two panels over x from minus 80 to 80. Left, means: pq follows a smooth S-shaped curve, qp jumps from minus 5 to plus 5 near zero. Right, scales: qp is constant near 1; pq peaks at 5 for x = 0 and follows its optimum down to about 2.5 at x = 30, but stays above it beyond."}}
x_wide = torch.linspace(-80, 80, 321).unsqueeze(-1)


def draw_outputs(axes, curves):
    for (encoder, colour, line), optimum in curves:
        q = at(encoder, x_wide)
        for ax, learned, best in zip(
            axes, (q.mean, q.stddev), (optimum.mean, optimum.stddev), strict=True
        ):
            ax.plot(x_wide, best, color=colour, lw=5, alpha=0.25)
            ax.plot(x_wide, learned[..., 0].T, color=colour, ls=line, lw=1)
    for ax, title in zip(axes, ("mean $m(x)$", "scale $s(x)$"), strict=True):
        ax.set(xlabel="$x$", title=title)
        floor, height = ax.get_ylim()[0], 0.25 * (ax.get_ylim()[1] - ax.get_ylim()[0])
        shade = floor + height * (density / density.max())
        ax.fill_between(x_grid[:, 0], floor, shade, color=plotting.GREY, alpha=0.25, lw=0)


figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0))
styles = ((cover, PQ, "-"), (warm, QP, "--"))
for (_, colour, line), label in zip(styles, ("pq", "qp"), strict=True):
    axes[0].plot([], [], color=colour, ls=line, label=label)
axes[0].legend(fontsize=8, loc="upper left")
draw_outputs(axes, zip(styles, best_gaussians(x_wide), strict=True))
plt.show()

# %% [markdown]
# ### Where the scale should have dropped
#
# The note wonders why the pq scale does not fall to the value of qp, and finds that it "would actually make more sense".
# It would, and the exact curve does fall. But only beyond $|x| pprox 40$, and how often does training go there?

# %%
# NBVAL_CHECK_OUTPUT
marginal = [Normal(mean, math.sqrt(101)) for mean in (-5.0, 5.0)]
for bound in (30.0, 40.0):
    tail = sum(
        0.5 * (m.cdf(torch.tensor(-bound)) + 1 - m.cdf(torch.tensor(bound))) for m in marginal
    )
    print(
        f"P(|x| > {bound:.0f}) = {tail:.5f}: {num_steps * batch_size * tail:.0f} of {num_steps * batch_size:,} draws"
    )

# %% [markdown]
# Nothing is wrong with the loss: {eq}`eq-pq-frame` weights every error with $f(x)$, and there $f = p$ is nearly zero.
# So change $f$, and leave all else as it is. We draw $x \sim \mathcal{N}(0, 40^2)$, and $z$ from the posterior at that $x$, which the toy model lets us do.
# (The other way to change $f$, the weight $w(x)$, is for {ref}`ex-pq-weight`.)

# %%
proposal = Independent(Normal(torch.zeros(1), 40.0), 1)


def pq_wide(encoder):
    x = proposal.sample((num_seeds, batch_size))
    return objectives.pq_loss(encoder, x, mixture.posterior(x).sample())


wide = GaussianNetworks()
fit(lambda: pq_wide(wide), wide.parameters())
exact, narrow, wider = (q.stddev[..., 0] for q in (best_pq, at(cover, x_test), at(wide, x_test)))
markdown_table(
    ["x", "exact scale", "pq on p(x): range over seeds", "pq on the wide proposal"],
    [
        [int(x), float(e), *(f"{s.min():.2f} to {s.max():.2f}" for s in (n, w))]
        for x, e, n, w in zip(x_test, exact, narrow.T, wider.T, strict=True)
    ],
)

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-proposal", "caption": "The scale of pq encoders trained on $x \sim p(x)$ and on $x \sim \mathcal{N}(0, 40^2)$; wide pale line: the posterior's standard deviation; shaded: the two densities of training observations, not to one scale. The scale drops where training looks."}, "image": {"alt": "Scale against x. The encoders trained on the wide proposal follow the exact curve down to 1 at x = 80; those trained on the marginal leave it at about x = 30 and stay between 1.5 and 3."}}
figure, ax = plt.subplots(figsize=(6.4, 3.0))
ax.plot(x_wide, next(best_gaussians(x_wide)).stddev, color=EXACT, lw=5, alpha=0.3)
for encoder, colour, line, label in (
    (cover, PQ, "-", "$p(x)$"),
    (wide, QP, "--", "the wide proposal"),
):
    ax.plot(x_wide, at(encoder, x_wide).stddev[..., 0].T, color=colour, ls=line, lw=1)
    ax.plot([], [], color=colour, ls=line, label=f"trained on {label}")
for log_density, colour in ((mixture.log_evidence, PQ), (proposal.log_prob, QP)):
    shade = log_density(x_wide).exp()
    ax.fill_between(x_wide[:, 0], shade / shade.max(), color=colour, alpha=0.15, lw=0)
ax.set(xlabel="$x$", ylabel="scale $s(x)$", ylim=(0, None))
ax.legend(fontsize=8)
plt.show()

# %%
# NBVAL_CHECK_OUTPUT
far = x_test[:, 0] >= 50
claim("beyond x = 50, training on p(x) leaves the scale at least 15 % too wide",
      (narrow[:, far] > 1.15 * exact[far]).all())  # fmt: skip
claim("training on the wide proposal brings it within 10 %",
      ((wider[:, far] / exact[far] - 1).abs() < 0.1).all())  # fmt: skip

# %% [markdown]
# (sec-pq-discrete)=
# ## Example 3: keep the component
#
# Both failures of example 2 come from the family. So let the encoder say which cluster it means:
#
# $$
# q_\phi(c, z \mid x) = q_\phi(c \mid x)\, q_\phi(z \mid x, c).
# $$ (eq-pq-joint)
#
# The exact posterior now belongs to the family, and both divergences can reach zero.
# We write a draw of the program, its *trace*, as a row of numbers $(c, z)$.
# A distribution over traces needs `log_prob` and nothing else for the pq loss.


# %%
class Branches:
    """A branch index from ``index``, then z from that branch of ``value`` (branches last)."""

    def __init__(self, logits, mean, log_scale):
        self.index, self.value = Categorical(logits=logits), Normal(mean, log_scale.exp())

    def log_prob(self, trace):
        branch, z = trace[..., :1].long(), trace[..., 1:]
        log_z = self.value.log_prob(z).gather(-1, branch)[..., 0]
        return self.index.log_prob(branch[..., 0]) + log_z

    def marginal(self):
        value = Normal(self.value.mean.unsqueeze(-1), self.value.stddev.unsqueeze(-1))
        return MixtureSameFamily(self.index, Independent(value, 1))


class ComponentEncoder(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.component, self.value = Networks(1, width, width, 2), Networks(3, width, width, 2)

    def forward(self, x):
        x = x / 10
        pairs = [torch.cat([x, one_hot.expand(*x.shape[:-1], 2)], -1) for one_hot in torch.eye(2)]
        mean, log_scale = torch.stack([self.value(pair) for pair in pairs], -1).unbind(-2)
        return Branches(self.component(x), 10 * mean, log_scale)


# %% [markdown]
# The qp loss meets its first obstacle: no gradient passes through a draw of $c$.
# With two values there is no need to draw. The sum over $c$ is exact, and $z$ stays reparameterised inside each branch:
#
# $$
# \ell_{qp}(x) = \sum_{c} q_\phi(c \mid x)\; \mathbb{E}_{q_\phi(z \mid x, c)}\bigl[\log q_\phi(c, z \mid x) - \log p(c, z, x)\bigr].
# $$ (eq-pq-sum)

# %%
clusters = torch.tensor([-5.0, 5.0])


def simulate_traces(num=batch_size):
    c = torch.randint(2, (num_seeds, num))
    z = torch.normal(clusters[c], 1.0)
    return torch.normal(z, 10.0).unsqueeze(-1), torch.stack([c.float(), z], -1)


def qp_sum_loss(q, x):
    z = q.value.rsample()  # one draw for each branch, [S, B, 2]
    log_p = math.log(0.5) + Normal(clusters, 1.0).log_prob(z) + Normal(z, 10.0).log_prob(x)
    log_q = q.index.logits + q.value.log_prob(z)
    return (q.index.probs * (log_q - log_p)).sum(-1)


cover_joint, seek_joint = ComponentEncoder(), ComponentEncoder()
fit(lambda: objectives.pq_loss(cover_joint, *simulate_traces()), cover_joint.parameters())
fit(lambda: qp_sum_loss(seek_joint(x := simulate_traces()[0]), x), seek_joint.parameters())

# %%
x_few = x_test[:5]
exact = mixture.posterior(x_few)
joint = {"pq": at(cover_joint, x_few), "qp": at(seek_joint, x_few)}
columns = [x_few, exact.mixture_distribution.probs[:, 1:]]
for q in joint.values():
    p_plus = q.index.probs[..., 1:]
    columns += [p_plus.mean(0), (p_plus - columns[1]).abs().amax(0)]
titles = [
    "$x$",
    "exact $P(+ \\mid x)$",
    "pq, mean of seeds",
    "largest error",
    "qp",
    "largest error",
]
markdown_table(titles, torch.cat(columns, -1).tolist(), decimals=3)

# %%
# NBVAL_CHECK_OUTPUT
component, probable = exact.component_distribution, exact.mixture_distribution.probs > 0.1
for name, q in joint.items():
    error_p = (q.index.probs - exact.mixture_distribution.probs).abs().max()
    error_mean = (q.value.mean - component.mean[..., 0]).abs()[:, probable].max()
    error_scale = (q.value.stddev - component.stddev[..., 0]).abs()[:, probable].max()
    claim(f"{name}: P(c | x) within 0.05, for x from 0 to 30 and every seed", error_p < 0.05)
    claim(f"{name}: means and scales of branches with a tenth of the mass within 0.2",
          max(error_mean, error_scale) < 0.2)  # fmt: skip

# %% [markdown]
# So the pq "defect" of example 2 was the family's, and the qp one too.
#
# A good encoder is also a good proposal. The note draws the posterior by resampling importance samples:
# draw from $q$, weight by $p(z, x) / q(z \mid x)$, resample. We do so at $x = 10$ with three proposals, and watch the effective sample size.


# %%
def resample(q, x, num=num_draws):
    """Importance resampling of p(z | x): draws from seed 0, and ESS / num of every seed."""
    z = q.sample((num,))  # [K, S, 1, 1]
    log_weights = mixture.log_joint(x, z) - q.log_prob(z)
    chosen = torch.multinomial(log_weights[:, 0, 0].softmax(0), num, replacement=True)
    return z[chosen, 0, 0, 0], effective_sample_size(log_weights)[:, 0] / num


proposals = {
    "example 2, pq": at(cover, x_shown),
    "example 2, qp": at(warm, x_shown),
    "example 3, pq": at(cover_joint, x_shown).marginal(),
}
resampled = {name: resample(q, x_shown) for name, q in proposals.items()}
markdown_table(
    ["proposal", "ESS in % of the draws, each seed", "resampled $P(z > 0 \\mid x = 10)$"],
    [
        [name, ", ".join(f"{100 * e:.0f}" for e in ess), float((z > 0).float().mean())]
        for name, (z, ess) in resampled.items()
    ],
    decimals=3,
)

# %% [markdown]
# The seeking proposal has a nearly perfect effective sample size and the wrong answer: exact is $P(z > 0 \mid x = 10) = 0.729$.
# Weights can only compare places where $q$ has been. Keep this for the day when a diagnostic looks too good.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-joint", "caption": "Example 3: posterior marginals at four observations. Top: $P(c \\mid x)$, exact (wide bars) and learned by each loss (marks, all seeds). Bottom: $p(z \\mid x)$, exact (filled), learned (lines, all seeds), and a histogram of resampled importance samples from the pq encoder (steps)."}, "image": {"alt": "Four columns for x equal to 0, 5, 10 and 20. The learned component probabilities lie on the exact bars, and both learned densities and the histogram lie on the exact two-peaked density."}}
figure, axes = plt.subplots(2, 4, figsize=(7.4, 4.0), sharey="row", height_ratios=(2, 3))
for (top, bottom), x in zip(axes.T, x_few[:4, None], strict=True):
    top.bar(["−", "+"], mixture.posterior(x).mixture_distribution.probs[0], color=EXACT, alpha=0.35)
    bottom.fill_between(
        z_grid[:, 0], mixture.posterior(x).log_prob(z_grid).exp(), color=EXACT, alpha=0.35, lw=0
    )
    for encoder, colour, line, shift in (
        (cover_joint, PQ, "-", -0.15),
        (seek_joint, QP, "--", 0.15),
    ):
        q = at(encoder, x)
        for c in (0, 1):
            top.plot([c + shift] * num_seeds, q.index.probs[:, 0, c], "o", ms=3, color=colour)
        curves = q.marginal().log_prob(z_grid[:, None, None]).exp()
        bottom.plot(z_grid, curves[..., 0], color=colour, ls=line, lw=1)
    draws, _ = resample(at(cover_joint, x).marginal(), x)
    bottom.hist(draws, bins=60, density=True, histtype="step", color=plotting.GREY, lw=0.8)
    top.set(title=f"$x = {x.item():g}$", xlabel="$c$")
    bottom.set(xlim=(-12, 12), xlabel="$z$")
axes[0, 0].set(ylabel="$P(c \\mid x)$", ylim=(0, 1))
axes[1, 0].set(ylabel="$p(z \\mid x)$")
plt.show()

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-joint-outputs", "caption": "Example 3: the network outputs against $x$, every seed; exact values as wide pale lines. In the middle and right panels the upper and lower branch belong to $c = +$ and $c = -$."}, "image": {"alt": "Three panels against x from minus 40 to 40: the probability of the right cluster is a sigmoid, the two branch means are nearly flat lines near plus and minus 5, the scales are near 1. Learned lines follow exact ones where observations are common."}}
x_band = torch.linspace(-40, 40, 161).unsqueeze(-1)
exact = mixture.posterior(x_band)
component = exact.component_distribution
truths = (exact.mixture_distribution.probs[:, 1:], component.mean[..., 0], component.stddev[..., 0])
figure, axes = plt.subplots(1, 3, figsize=(7.4, 2.6))
for ax, truth, title in zip(axes, truths, ("$q(c = + \\mid x)$", "means", "scales"), strict=True):
    ax.plot(x_band, truth, color=EXACT, lw=5, alpha=0.3)
    ax.set(title=title, xlabel="$x$")
for encoder, colour, line, label in ((cover_joint, PQ, "-", "pq"), (seek_joint, QP, "--", "qp")):
    q = at(encoder, x_band)
    for ax, learned in zip(
        axes, (q.index.probs[..., 1:], q.value.mean, q.value.stddev), strict=True
    ):
        ax.plot(x_band, learned.movedim(0, -1).flatten(1), color=colour, ls=line, lw=1)
    axes[0].plot([], [], color=colour, ls=line, label=label)
axes[0].legend(fontsize=8)
axes[2].set_ylim(0, 2)
plt.show()

# %% [markdown]
# ### When the sum is too long
#
# With many discrete variables no one can sum. Three ways remain to follow $\nabla_\phi \mathbb{E}_{q_\phi(c)}[f(c)]$.
#
# - *Score function* {cite:p}`williams1992reinforce`: $\mathbb{E}[f(c) \nabla \log q_\phi(c)]$. Unbiased for any $c$, and noisy.
# - *The same with a control variate*: subtract the mean of the other samples from each $f(c_k)$ {cite:p}`mnih2016vimco`.
#   It does not depend on $c_k$, so it changes the variance and not the mean.
# - *Relaxation* {cite:p}`maddison2017concrete,jang2017gumbel`: replace $c$ by a smooth function of noise, here
#   $\operatorname{sigmoid}\bigl((\lambda + \text{logistic noise}) / \tau\bigr)$, and differentiate through it. Biased, the more so the larger $\tau$.
#
# Each estimator below gets two evaluations of $f$. They estimate the derivative of the bound in one logit $\lambda$ at $x = 10$, for an encoder that is half trained:
# the branches are one unit off and too wide.

# %%
logit = torch.zeros(num_draws, requires_grad=True)  # one copy for each replicate
branch_mean, branch_scale, noise = torch.tensor([-3.9, 6.1]), 1.5, torch.randn(2, num_draws)


def log_q_component(c):  # c may be relaxed: a number between 0 and 1
    return c * logsigmoid(logit) + (1 - c) * logsigmoid(-logit)


def log_weight(c, noise=noise):
    mean = branch_mean[0] + c * branch_mean.diff()
    z = mean + branch_scale * noise
    log_p = math.log(0.5) + Normal(10 * c - 5, 1.0).log_prob(z) + Normal(z, 10.0).log_prob(x_shown)
    return log_p - log_q_component(c) - Normal(mean, branch_scale).log_prob(z)


def relaxed(temperature):
    uniform = torch.rand(2, num_draws)
    return ((logit + uniform.logit()) / temperature).sigmoid()


# %%
values = torch.tensor([[0.0], [1.0]])  # both values of c
probs = log_q_component(values).exp()
drawn = torch.bernoulli(torch.full((2, num_draws), 0.5))
score = objectives.score_function_surrogate
surrogates = {
    "exact sum": (probs * log_weight(values)).sum(0),
    "exact sum, noise of z shared": (probs * log_weight(values, noise[:1])).sum(0),
    "score function": score(log_weight(drawn), log_q_component(drawn), baseline=False),
    "score function, control variate": score(log_weight(drawn), log_q_component(drawn)),
    "relaxation, temperature 1": log_weight(relaxed(1.0)).mean(0),
    "relaxation, temperature 0.5": log_weight(relaxed(0.5)).mean(0),
}
posterior = mixture.posterior(x_shown)
branch = Normal(
    *(
        v[0, :, 0]
        for v in (posterior.component_distribution.mean, posterior.component_distribution.stddev)
    )
)
kl = kl_divergence(Normal(branch_mean, branch_scale), branch)
exact_gradient = float(0.25 * (posterior.mixture_distribution.logits.diff() - kl.diff()))

# %%
estimates = {}
for name, surrogate in surrogates.items():
    (gradient,) = torch.autograd.grad(surrogate.sum(), logit, retain_graph=True)
    bias, scale = float(gradient.mean() - exact_gradient), float(gradient.std())
    estimates[name] = [bias, abs(bias) * num_draws**0.5 / scale, scale]
print(f"exact derivative {exact_gradient:.4f}")
markdown_table(
    [
        "two evaluations of f",
        "bias",
        "bias / its standard error",
        "standard deviation of one estimate",
    ],
    [[name, *row] for name, row in estimates.items()],
    decimals=3,
)

# %%
# NBVAL_CHECK_OUTPUT
for name, (_, bias_in_errors, _) in estimates.items():
    print(f"{name}: {'biased' if bias_in_errors > 6 else 'no bias found'}")
print("smallest to largest spread:", *sorted(estimates, key=lambda n: estimates[n][2]), sep="\n  ")

# %% [markdown]
# (sec-pq-universe)=
# ## Example 4: an open universe
#
# Now the number of variables is itself random. First $n \in \{1, 2\}$ is drawn.
# If $n = 1$ then $z \sim \mathcal{N}(0, 1)$; if $n = 2$ a cluster $c$ is drawn and $z \sim \mathcal{N}(\pm 5, 1)$. We see $x \sim \mathcal{N}(z, 1)$.
# The note's own lists of this model are lost to us; the settings are those of its author's next programs, and of {cite:t}`le2019rws`.
#
# A path through the program is a branch, and each branch has its own network: one for $P(n \mid x)$, one for $P(c \mid x, n = 2)$, one for $z$ on either side.
# `Branches` serves unchanged, with three branches whose log-probabilities are sums along the path. So does `pq_loss`: it never asks what a trace contains.


# %%
def open_universe(num=batch_size):
    n = torch.randint(1, 3, (num_seeds, num))
    c = torch.randint(2, (num_seeds, num))  # idle when n = 1
    z = torch.normal(torch.where(n == 1, 0.0, clusters[c]), 1.0)
    branch = torch.where(n == 1, 0, 1 + c)
    return torch.normal(z, 1.0).unsqueeze(-1), torch.stack([branch.float(), z], -1)


class UniverseEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.count, self.single = Networks(1, 8, 8, 1), Networks(1, 8, 8, 2)
        self.cluster = ComponentEncoder(width=8)

    def forward(self, x):
        two, of_two = self.count(x), self.cluster(10 * x)  # P(n = 2 | x), and (c, z) given n = 2
        logits = torch.cat([logsigmoid(-two), logsigmoid(two) + of_two.index.logits], -1)
        mean, log_scale = self.single(x).chunk(2, dim=-1)
        return Branches(
            logits,
            torch.cat([mean, of_two.value.mean], -1),
            torch.cat([log_scale, of_two.value.stddev.log()], -1),
        )


# %%
universe_encoder = UniverseEncoder()
fit(
    lambda: objectives.pq_loss(universe_encoder, *open_universe()),
    universe_encoder.parameters(),
    0.02,
)
universe = GaussianMixture(
    torch.tensor([2.0, 1.0, 1.0]), torch.tensor([0.0, -5.0, 5.0]), torch.ones(3), 1.0
)
universe.requires_grad_(False)  # the same model with n and c summed out: the exact posterior
x_universe = torch.tensor([0.0, 1.0, 2.0, 2.5, 3.0, 5.0, 8.0]).unsqueeze(-1)
exact, q = universe.posterior(x_universe), at(universe_encoder, x_universe)
columns = [x_universe]
for truth, learned in (
    (exact.mixture_distribution.probs[:, :1], q.index.probs[..., :1]),
    (exact.mean, q.marginal().mean),
    (exact.stddev, q.marginal().stddev),
):
    columns += [truth, learned.mean(0), (learned - truth).abs().amax(0)]
titles = [
    "$P(n = 1 \\mid x)$",
    "learned",
    "error",
    "mean",
    "learned",
    "error",
    "scale",
    "learned",
    "error",
]
markdown_table(["$x$", *titles], torch.cat(columns, -1).tolist(), decimals=3)

# %%
# NBVAL_CHECK_OUTPUT
error = (q.index.probs - exact.mixture_distribution.probs).abs().max()
claim("every path's probability is within 0.06 up to x = 8, for every seed", error < 0.06)

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-universe", "caption": "Example 4: inferred and true posteriors. Left: over the number of clusters and, given two, over the component; exact values as wide pale lines, every seed as a thin one. Right: over the value $z$ at three observations, exact (filled) and learned (lines)."}, "image": {"alt": "Left panel: the probability of one cluster is near one for small x and falls to zero beyond 2.8; the probability of the right component is a steep sigmoid. Right panels: densities of z at x equal to 1, 2.5 and 5, with learned lines on the exact shapes, two-peaked at 2.5."}}
x_band = torch.linspace(-8, 8, 161).unsqueeze(-1)
figure, axes = plt.subplots(1, 4, figsize=(7.6, 2.8), width_ratios=(2, 1, 1, 1))
for q, style in (
    (universe.posterior(x_band), {"lw": 5, "alpha": 0.3}),
    (at(universe_encoder, x_band), {"lw": 1}),
):
    probs = q.index.probs if isinstance(q, Branches) else q.mixture_distribution.probs[None]
    right = probs[..., 2] / probs[..., 1:].sum(-1)
    for curve, colour, line in ((probs[..., 0], PQ, "-"), (right, QP, "--")):
        axes[0].plot(x_band, curve.T, color=colour, ls=line, **style)
axes[0].plot([], [], color=PQ, label="$P(n = 1 \\mid x)$")
axes[0].plot([], [], color=QP, ls="--", label="$P(+ \\mid x, n = 2)$")
axes[0].set(xlabel="$x$", ylabel="probability", ylim=(-0.03, 1.5), yticks=(0, 0.5, 1))
axes[0].legend(fontsize=8, loc="upper left")
for ax, x in zip(axes[1:], (1.0, 2.5, 5.0), strict=True):
    x = torch.full((1, 1), x)
    curves = at(universe_encoder, x).marginal().log_prob(z_grid[:, None, None]).exp()
    ax.fill_between(
        z_grid[:, 0], universe.posterior(x).log_prob(z_grid).exp(), color=EXACT, alpha=0.35, lw=0
    )
    ax.plot(z_grid, curves[..., 0], color=PQ, lw=1)
    ax.set(xlim=(-3, 8), xlabel="$z$", title=f"$x = {x.item():g}$")
plt.show()

# %% [markdown]
# (sec-pq-particles)=
# ## Between the two: reweighted wake-sleep
#
# pq never looks at data, qp cannot pass through branches. Reweighted wake-sleep {cite:p}`bornschein2015rws` takes from both.
# At a real $x$ it replaces the draw from the posterior by $K$ weighted draws from $q$, with $\bar w_k \propto w_k = p_\theta(x, z_k) / q_\phi(z_k \mid x)$:
#
# $$
# \text{wake-}\phi: \; -\sum_{k} \bar w_k \nabla_\phi \log q_\phi(z_k \mid x), \qquad
# \text{wake-}\theta: \; -\sum_{k} \bar w_k \nabla_\theta \log p_\theta(x, z_k).
# $$ (eq-pq-rws)
#
# Wake-$\phi$ descends the forward divergence at data, with a bias of order $1/K$ that will turn out to matter; wake-$\theta$ ascends the importance-weighted bound $\mathcal{L}_K$ of {cite:t}`burda2016iwae`.
# No draw is differentiated, so any $z$ will do.
#
# The two also differ in what they do with more particles. A tighter $\mathcal{L}_K$ leaves less and less for the encoder to gain:
# {cite:t}`rainforth2018tighter` show that the signal-to-noise ratio of its reparameterised gradient falls as $K^{-1/2}$.
# The wake-$\phi$ gradient tends to the gradient of a divergence that does not vanish, so its ratio rises as $K^{1/2}$.
# {cite:t}`tucker2019dreg` repair the first. We measure all three in example 1, at an encoder whose offset and scale are wrong.

# %%
particles = (2, 4, 8, 16, 32)


def signal_to_noise(surrogate, num_samples):
    """Norm of the mean gradient in (a, b, log c) over the root of its total variance."""
    phi = torch.tensor([0.5, 0.3, 0.0]).repeat(num_draws, 1).requires_grad_()
    x = torch.full((num_draws, 1), 1.5)
    q = Independent(Normal(phi[:, :1] * x + phi[:, 1:2], phi[:, 2:].exp()), 1)
    surrogate(unknown_mean, q, x, num_samples).sum().backward()
    return float(phi.grad.mean(0).norm() / phi.grad.var(0).sum().sqrt())


encoder_gradients = {
    "IWAE": objectives.iwae_bound,
    "IWAE, doubly reparameterised": objectives.dreg_surrogate,
    "wake-φ": objectives.wake_phi_loss,
}
ratios = {
    name: [signal_to_noise(surrogate, k) for k in particles]
    for name, surrogate in encoder_gradients.items()
}

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-snr", "caption": "Signal-to-noise ratio of one encoder gradient against the number of particles. Grey guides have slopes $+\\tfrac12$ and $-\\tfrac12$."}, "image": {"alt": "Log-log plot. The ratio falls with slope one half for the plain importance-weighted bound, and rises with slope one half for its doubly reparameterised gradient and for wake-phi."}}
figure, ax = plt.subplots(figsize=(5.6, 3.0))
marks = {
    "IWAE": ("o--", QP),
    "IWAE, doubly reparameterised": ("s:", plotting.COLOURS["samples"]),
    "wake-φ": ("D-", PQ),
}
for name, (mark, colour) in marks.items():
    ax.loglog(particles, ratios[name], mark, color=colour, label=name)
for slope in (-0.5, 0.5):
    guide = [0.25 * (k / particles[0]) ** slope for k in particles]
    ax.loglog(particles, guide, **plotting.LINES["reference"])
ax.set(xlabel="particles $K$", ylabel="signal / noise", xticks=particles, xticklabels=particles)
ax.legend(fontsize=8)
plt.show()

# %%
# NBVAL_CHECK_OUTPUT
for name, ratio in ratios.items():
    slope = math.log(ratio[-1] / ratio[0]) / math.log(particles[-1] / particles[0])
    print(f"{name}: the ratio {'rises' if slope > 0 else 'falls'}, by about K^{2 * slope:.0f}/2")

# %% [markdown]
# ## When the model is wrong
#
# **The data come from elsewhere.** Let three in ten observations come from a faulty sensor, $x \sim \mathcal{N}(60, 5^2)$, while the model stays as in {ref}`sec-pq-mixture`.
# Its posterior there is still well defined: one mode, scale close to 1. Which encoder knows it?
# pq was trained on the model's dreams and has never seen such an $x$. We go on from the pq encoder in three ways: with qp on the data,
# with wake-$\phi$ on the data, and with equal parts of wake-$\phi$ on the data and pq on dreams, as {cite:t}`bornschein2015rws` do.


# %%
def observed():
    x, _ = simulate(mixture)
    faulty = torch.rand_like(x) < 0.3
    return torch.where(faulty, torch.normal(60.0, 5.0, x.shape), x)


def wake(encoder):
    x = observed()
    return objectives.wake_phi_loss(mixture, encoder(x), x, num_samples=10)


on_data = {
    "qp": lambda q: objectives.qp_loss(mixture, q(x := observed()), x),
    "wake-φ, K = 10": wake,
    "wake-φ, K = 10, and sleep": lambda q: 0.5 * wake(q) + 0.5 * pq_mixture(q),
}
encoders = {"pq, before": cover} | {name: copy.deepcopy(cover) for name in on_data}
for name, loss in on_data.items():
    q = encoders[name]
    fit(lambda loss=loss, q=q: loss(q), q.parameters(), step_size=0.005)

# %%
x_faulty = torch.linspace(50, 70, 41).unsqueeze(-1)
faulty_density = Normal(60.0, 5.0).log_prob(x_faulty[:, 0]).exp()
regions = ((x_grid, density), (x_faulty, faulty_density / faulty_density.sum()))
errors = {
    name: [(w * kl).sum(-1).mean() for x, w in regions for kl in divergences(at(q, x), x)]
    for name, q in encoders.items()
}
markdown_table(
    ["encoder", "model's x: KL(p‖q)", "KL(q‖p)", "faulty x: KL(p‖q)", "KL(q‖p)"],
    [[name, *map(float, error)] for name, error in errors.items()],
    decimals=3,
)

# %% [markdown]
# Everyone who saw the faulty $x$ is right about it. The surprise is in the first column: wake-$\phi$ with ten particles *seeks*.
# Its bias of order $1/K$ has a direction. A narrow $q$ hears only of the mode it sits on, and its own weights tell it that all is well.
# Dreams bring the other mode back: sleep keeps the encoder honest where the model lives, wake where the data are.

# %%
# NBVAL_CHECK_OUTPUT
forward, faulty = ({name: error[i] for name, error in errors.items()} for i in (0, 2))
claim("pq is the worst encoder at the faulty x", max(faulty, key=faulty.get) == "pq, before")
claim("wake-φ alone has lost a mode at the model's x", forward["wake-φ, K = 10"] > 5)
both = "wake-φ, K = 10, and sleep"
claim("wake-φ and sleep together are good at both", forward[both] < 1 and faulty[both] < 0.2)

# %% [markdown]
# **The model is being learned.** Now $\theta$ moves too. Let the cluster centres $\pm\mu$ be unknown, the data come from $\mu = 5$, and give every loss the best Gaussian encoder there is, {eq}`eq-pq-optima`.
# qp then maximises $\mathbb{E}[\log p_\theta(x)] - \mathbb{E}[\operatorname{KL}(q^* \,\|\, p)]$, and the second term depends on $\theta$:
# the model can please its encoder by moving the clusters apart, so that one mode is all there is.
# With $K$ particles from the covering encoder, wake-$\theta$ ascends $\mathcal{L}_K$.

# %%
centres = torch.arange(1.0, 13.1, 0.5)
x_data, weight = x_grid[::10], density[::10] / density[::10].sum()
objective = {
    name: [] for name in ("log p(x)", "qp", "wake-θ, K = 10", "wake-θ, K = 100", "wake-θ, K = 1000")
}
for centre in centres:
    candidate = GaussianMixture(torch.ones(2), torch.stack([-centre, centre]), torch.ones(2), 10.0)
    candidate.requires_grad_(False)
    exact, evidence = candidate.posterior(x_data), candidate.log_evidence(x_data)
    q = Independent(Normal(exact.mean, exact.stddev), 1)
    values = [evidence, evidence + exact.mixture_distribution.probs.amax(-1).log()]
    for num_particles in (10, 100, 1000):
        torch.manual_seed(seed)  # common random numbers for all centres
        values.append(-objectives.wake_theta_loss(candidate, q, x_data, num_particles))
    for name, value in zip(objective, values, strict=True):
        objective[name].append(float((weight * value).sum()))

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-theta", "caption": "What each objective prefers for the cluster centre $\\mu$, with the best encoder at each $\\mu$; a triangle marks each maximum. The data come from $\\mu = 5$ (dotted)."}, "image": {"alt": "Objectives against the centre mu. The evidence peaks at 5. The qp bound with its best Gaussian peaks at 9. The importance-weighted bounds from the covering encoder peak far below 5 for ten particles and approach 5 as particles are added."}}
figure, ax = plt.subplots(figsize=(6.0, 3.2))
styles = [(EXACT, "-"), (QP, "--"), *((PQ, line) for line in (":", "-.", "-"))]
for (name, curve), (colour, line) in zip(objective.items(), styles, strict=True):
    ax.plot(centres, curve, color=colour, ls=line, label=name)
    top = max(range(len(curve)), key=curve.__getitem__)
    ax.plot(centres[top], curve[top], "v", color=colour)
ax.axvline(5, **plotting.LINES["reference"])
ax.set(xlabel="centre $\\mu$ of the model", ylabel="objective in nats", ylim=(-4.6, -3.8))
ax.legend(fontsize=8)
plt.show()

# %%
# NBVAL_CHECK_OUTPUT
preferred = {name: float(centres[torch.tensor(c).argmax()]) for name, c in objective.items()}
mean_distance = float((weight * x_data[:, 0].abs()).sum())
print(f"maximum likelihood: {preferred['log p(x)']}; qp: {preferred['qp']}")
print(f"mean of |x|: {mean_distance:.1f}")
ladder = [preferred[f"wake-θ, K = {k}"] for k in (10, 100, 1000)]
print("wake-θ comes nearer to maximum likelihood with more particles:",
      ladder[0] < ladder[1] <= ladder[2] <= preferred["log p(x)"] + 0.5)  # fmt: skip

# %% [markdown]
# qp does not stop at 5 but at the mean of $|x|$, where hard assignment of each $x$ to one cluster would put it. It is a bias of the bound; no amount of data removes it, a richer $q$ would.
# Particles from a covering proposal remove it step by step.
#
# ## What to take along
#
# - *Derive.* Both losses come from {eq}`eq-pq-frame`. qp needs a density and a path through $q$'s draws; pq needs a simulator; {numref}`tab-pq-needs` has the rest.
# - *Predict.* A small family covers under pq (posterior moments) and seeks under qp (one mode, component scale). Both are learned only where $f(x)$ has mass.
# - *Discrete variables.* Sum if you can; else a control variate; else accept the bias of a relaxation. pq and wake-$\phi$ avoid the question.
# - *Open universes.* A trace with `log_prob` is all that pq asks of a program.
# - *Particles and wrong models.* More particles drown the encoder of IWAE and sharpen that of reweighted wake-sleep. pq is blind off the model; qp bends the model towards its encoder.
#
# ## Exercises
#
# ```{exercise} The price of a slip
# :label: ex-pq-slip
# Write a function `price(r)` that returns the excess of the qp and of the pq loss over their minimum in {ref}`example 1 <sec-pq-affine>` when the encoder's scale is $r$ times the right one.
# Which loss punishes $r = 1/2$ more, which $r = 2$? Explain with the words *cover* and *seek*.
# ```

# %%
# Your answer

# %% [markdown]
# ```{solution-start} ex-pq-slip
# :label: sol-pq-slip
# :class: dropdown
# ```
#
# Both are divergences between Gaussians of equal mean. Too narrow is expensive for pq, which must cover; too wide is expensive for qp, which must not leave the mass.


# %%
def price(r):
    return -math.log(r) + (r**2 - 1) / 2, math.log(r) + (r**-2 - 1) / 2


narrow, right = Normal(0.0, 0.5), Normal(0.0, math.sqrt(0.5))
checks.close(price(math.sqrt(0.5))[0], kl_divergence(narrow, right), label="the qp price")
checks.close(price(math.sqrt(0.5))[1], kl_divergence(right, narrow), label="the pq price")
print("qp and pq at r = 1/2:", price(0.5), "at r = 2:", price(2.0))

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Weight instead of proposal
# :label: ex-pq-weight
# {numref}`fig-pq-proposal` changed $\pi$. Change $w$ instead: draw $(z, x)$ from the model, and multiply each pq loss by $w(x) = \mathcal{N}(x; 0, 40^2) / p(x)$.
# In expectation this is the same $f$. Compute the effective sample size of the weights among `num_draws` draws, and the share of the largest one. Would you train like this?
# ```

# %%
# Your answer

# %% [markdown]
# ```{solution-start} ex-pq-weight
# :label: sol-pq-weight
# :class: dropdown
# ```
#
# No. Observations beyond $|x| = 40$ carry a third of $f$, and the model hardly ever draws one. A few draws carry all of the weight, and most of what they should stand for is missing.

# %%
x, _ = mixture.sample(num_draws)
log_weights = Normal(0.0, 40.0).log_prob(x[:, 0]) - mixture.log_evidence(x)
size = float(effective_sample_size(log_weights))
largest = float(log_weights.softmax(0).max())
print(
    f"ESS is {100 * size / num_draws:.2f} % of {num_draws} draws; the largest weight has {100 * largest:.0f} %"
)
assert size < 0.2 * num_draws

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} A model of your own
# :label: ex-pq-model
# Write a new generative model as a simulator, for instance counts: $z \sim \mathcal{N}(0, 1)$, $x \mid z \sim \operatorname{Poisson}(e^{1 + z})$.
# Train a Gaussian encoder with `pq_loss`; feed it $\log(1 + x)$. Compare its mean and scale at $x = 0, 3, 10$ with the posterior moments by quadrature.
# Why could you not have used `qp_loss` without writing more code? What would you have to write?
# ```

# %%
# Your answer

# %% [markdown]
# ```{solution-start} ex-pq-model
# :label: sol-pq-model
# :class: dropdown
# ```
#
# The simulator is three lines. `qp_loss` needs `log_joint(x, z)`, so it needs a density, and a path for the gradient in $z$.


# %%
class CountEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = Networks(1, 16, 16, 2)

    def forward(self, x):
        mean, log_scale = self.network(torch.log1p(x)).chunk(2, dim=-1)
        return Independent(Normal(mean, log_scale.exp()), 1)


def simulate_counts():
    z = torch.randn(num_seeds, batch_size, 1)
    return torch.poisson((1 + z).exp()), z


count_encoder = CountEncoder()
fit(lambda: objectives.pq_loss(count_encoder, *simulate_counts()), count_encoder.parameters())

# %%
x = torch.tensor([[0.0], [3.0], [10.0]])
z = torch.linspace(-6, 6, 2001)
log_posterior = Normal(0.0, 1.0).log_prob(z) + torch.distributions.Poisson((1 + z).exp()).log_prob(
    x
)
weight = log_posterior.softmax(-1)
mean = (weight * z).sum(-1)
scale = (weight * (z - mean[:, None]) ** 2).sum(-1).sqrt()
q = at(count_encoder, x)
if num_steps >= 1000:
    checks.close(q.mean[..., 0].mean(0), mean, atol=0.1, label="the mean")
    checks.close(q.stddev[..., 0].mean(0), scale, atol=0.1, label="the scale")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} One particle teaches nothing
# :label: ex-pq-one
# Show that the expected wake-$\phi$ gradient is zero for $K = 1$, whatever $q$ is. Check it with `wake_phi_loss` in example 1 at a wrong encoder, and show that with $K = 2$ it is not zero.
# ```

# %%
# Your answer

# %% [markdown]
# ```{solution-start} ex-pq-one
# :label: sol-pq-one
# :class: dropdown
# ```
#
# A single normalised weight is 1, and $\mathbb{E}_q[\nabla_\phi \log q_\phi] = \nabla_\phi \int q_\phi = 0$.

# %%
for num_particles in (1, 2):
    shift = torch.zeros(num_draws, 1, requires_grad=True)
    q = Independent(Normal(shift, 1.0), 1)
    objectives.wake_phi_loss(
        unknown_mean, q, torch.ones(num_draws, 1), num_particles
    ).sum().backward()
    mean, error = float(shift.grad.mean()), float(shift.grad.std() / num_draws**0.5)
    if num_particles == 1:
        checks.within_error(mean, 0.0, error, label="the gradient with K = 1")
    else:
        assert abs(mean) > 6 * error
        print(f"K = 2: {mean:.3f} ± {error:.3f}")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Twenty components (a project)
# :label: ex-pq-project
# {cite:t}`le2019rws` learn the weights of a mixture with twenty components, $c \sim \operatorname{Discrete}(\theta)$, $x \mid c \sim \mathcal{N}(10 c, 5^2)$, from data, with a network $q(c \mid x)$.
# Train it with `wake_theta_loss` and `wake_phi_loss` for $K = 2, 5, 10, 20$, and with the score function on $\mathcal{L}_K$. Plot the error of $\theta$ against $K$ for ten seeds. Which method does {numref}`fig-pq-snr` predict to win?
# ```
#
# ## References
#
# ```{bibliography}
# :filter: docname in docnames
# ```
