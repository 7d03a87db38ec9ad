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
# Runs in under a minute on two cores; needs the evidence lower bound and reparameterisation, as in chapter 1.
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
batch_size: int = 1000  # observations in a step, for each seed
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

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from amortised import encoders, models, numerics, objectives, plotting, results

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
# The gradient in $\theta$ is $-\mathbb{E}_{q_\phi}[\nabla_\theta \log p_\theta(x, z)]$: a density again, but no path.
#
# **Forward divergence: the pq loss.**
# Swap the arguments. Now the expectation is under the model, and the posterior would be needed to draw from:
#
# $$
# \begin{aligned}
# \mathbb{E}_{p(x)} \operatorname{KL}\bigl(p(\cdot \mid x) \,\|\, q_\phi(\cdot \mid x)\bigr)
# &= \mathbb{E}_{p(x)}\, \mathbb{E}_{p(z \mid x)}\bigl[\log p(z \mid x) - \log q_\phi(z \mid x)\bigr] \\
# &= \mathbb{E}_{p(x, z)}\bigl[-\log q_\phi(z \mid x)\bigr] - \mathrm{H}[z \mid x],
# \end{aligned}
# $$ (eq-pq-pq)
#
# with $\mathrm{H}[z \mid x]$ the mean entropy of the posterior, a constant. But drawing $x$ and then $z$ from the posterior is the same as drawing $z$ and then $x$ from the model.
# The average over $x$, which looked like a burden, is what makes the loss $\ell_{pq}(x, z) = -\log q_\phi(z \mid x)$ computable:
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
unknown_mean = models.LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0).requires_grad_(False)
x, z = unknown_mean.sample(num_draws)
loss_qp = objectives.qp_loss(unknown_mean, unknown_mean.posterior(x), x)
loss_pq = objectives.pq_loss(unknown_mean.posterior, x, z)
for name, loss, variance in (("qp", loss_qp, 2.0), ("pq", loss_pq, 0.5)):
    entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
    print(f"{name}: entropy {entropy:.4f} nats; ", end="")
    checks.within_error(loss.mean(), entropy, loss.std() / num_draws**0.5, label="the mean loss")

# %% [markdown]
# ## The two directions, in motion
#
# What if no member of the family is exact?
# Take a latent with two clusters, $z \sim \tfrac12 \mathcal{N}(-5, 1) + \tfrac12 \mathcal{N}(5, 1)$, seen through heavy noise, $x \mid z \sim \mathcal{N}(z, 10^2)$.
# The posterior is again a mixture of two Gaussians, and `mixture.posterior(x)` returns it.
# In one dimension both divergences are sums over a grid.

# %%
mixture = models.GaussianMixture(torch.ones(2), torch.tensor([-5.0, 5.0]), torch.ones(2), 10.0)
mixture.requires_grad_(False)
z_grid = torch.linspace(-30, 30, 601).unsqueeze(-1)  # [G, 1], in steps of 0.1


def divergences(q, x):
    """KL(p || q) and KL(q || p) at observations x [B, 1], by quadrature over z."""
    z = z_grid.reshape(-1, *[1] * len(q.batch_shape), 1)
    log_p, log_q = mixture.posterior(x).log_prob(z), q.log_prob(z)
    return [0.1 * (a.exp() * (a - b)).sum(0) for a, b in ((log_p, log_q), (log_q, log_p))]


# %% [markdown]
# We observe $x = 10$ and let a single Gaussian walk downhill on each divergence, without any noise in the way.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-motion", "caption": "One Gaussian walks downhill on each divergence to the same posterior at $x = 10$ (filled). Left: the densities. Right: their mean and scale; the whole paths are faint. pq spreads over both modes; qp closes in on one, and where it starts decides which. Above the figure: where each walk ends."}, "image": {"alt": "Animation. A wide Gaussian stays wide under the forward divergence and covers both peaks; under the reverse divergence it shrinks onto the higher right peak; a third one, started on the left, shrinks onto the lower left peak."}}
walkers = torch.tensor([[0.0, 1.6], [0.0, 1.6], [-3.0, 1.1]], requires_grad=True)  # mean, log scale
styles = ((PQ, "-", "pq"), (QP, "-", "qp"), (QP, ":", "qp from the left"))
descent, path, x_shown = torch.optim.Adam([walkers], lr=0.05), [], torch.tensor([[10.0]])
for _ in range(200):
    path.append(walkers.detach().clone())
    q = Independent(Normal(walkers[:, :1], walkers[:, 1:].exp()), 1)
    forward, reverse = divergences(q, x_shown)
    descent.zero_grad()
    (forward[0] + reverse[1:].sum()).backward()
    descent.step()
for i, (_, _, label) in enumerate(styles):
    print(f"{label}: KL(p‖q) = {forward[i]:.3f}, KL(q‖p) = {reverse[i]:.3f}")
exact, walks = mixture.posterior(x_shown).log_prob(z_grid).exp(), torch.stack(path[::8], -1)


def draw(figure, frame):
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.fill_between(z_grid[:, 0], exact, color=EXACT, alpha=0.35, lw=0)
    for (colour, line, label), (mean, log_scale) in zip(styles, walks, strict=True):
        q = Normal(mean[frame], log_scale[frame].exp())
        left.plot(z_grid, q.log_prob(z_grid).exp(), color=colour, ls=line)
        right.plot(mean, log_scale.exp(), color=colour, ls=line, lw=1, alpha=0.7, label=label)
        right.plot(q.mean, q.stddev, "o", color=colour, ms=5)
    left.set(xlim=(-15, 15), ylim=(0, 0.45), xlabel="$z$", ylabel="density")
    right.legend(loc="lower center", fontsize=8)
    right.set(xlim=(-7, 7), ylim=(-1.6, 6), xlabel="mean $\\mu$", ylabel="scale $\\sigma$")


plotting.animate(draw, 25, size=(6.4, 3.0), dpi=110, alt="q moves under each divergence")

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
# The note publishes no settings. Here every encoder takes `num_steps` steps of Adam, whose size falls to zero along a cosine, and every step sees `batch_size` new observations.
# A step with a thousand of them takes hardly longer than one with a hundred, so we prefer large batches to many steps.


# %%
def fit(encoder, loss_fn, *arguments, step_size=0.01):
    """Minimise ``loss_fn(encoder, *arguments)``, which returns [num_seeds, B]."""
    optimiser = torch.optim.Adam(encoder.parameters(), lr=step_size, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    for _ in range(num_steps):
        optimiser.zero_grad()
        loss_fn(encoder, *arguments).mean(-1).sum().backward()  # the seeds share nothing
        optimiser.step()
        schedule.step()


def simulate(model):
    x, z = model.sample(num_seeds * batch_size)
    return x.unflatten(0, (num_seeds, -1)), z.unflatten(0, (num_seeds, -1))


def pq(encoder, model):
    return objectives.pq_loss(encoder, *simulate(model))


def qp(encoder, model):
    x, _ = simulate(model)
    return objectives.qp_loss(model, encoder(x), x)


def claim(statement, holds):
    """Assert what trained encoders do; a run too short to train them only reports it."""
    assert holds or num_steps < 1000, statement
    print("✓" if holds else "✗", statement)


def branch_error(encoder, model, x):  # for examples 3 and 4
    """Largest error of the probability of any branch, over all x and seeds."""
    learned, exact = (q.mixture_distribution.probs for q in (at(encoder, x), model.posterior(x)))
    return (learned - exact).abs().max()


# %%
class AffineEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi, self.path = nn.Parameter(0.5 * torch.randn(num_seeds, 1, 3)), []

    def forward(self, x):
        self.path.append(self.phi.detach().clone())
        a, b, log_c = self.phi.split(1, dim=-1)
        return Independent(Normal(a * x + b, log_c.exp().expand_as(x)), 1)


affine = {"pq": AffineEncoder(), "qp": AffineEncoder()}

# %%
optimum = torch.tensor([0.5, 0.0, math.sqrt(0.5)])
columns = [list("abc"), optimum.tolist()]
for name, loss in (("pq", pq), ("qp", qp)):
    fit(affine[name], loss, unknown_mean, step_size=0.03)
    learned = torch.cat([affine[name].phi[:, 0, :2], affine[name].phi[:, 0, 2:].exp()], -1).detach()
    error = (learned - optimum).abs().amax(0)
    claim(f"{name} finds a, b and c to 0.02, for every seed", error.max() < 0.02)
    columns += [learned.mean(0).tolist(), error.tolist()]
titles = ["", "optimum", "pq: mean of seeds", "largest error", "qp: mean of seeds", "largest error"]
results.markdown_table(titles, zip(*columns, strict=True), decimals=4)

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-affine", "caption": "Example 1: the three encoder parameters, and the excess of each expected loss over its minimum (exact, from the parameters), during training; one thin line for each seed. The optimum {eq}`eq-pq-gaussian` is dotted. Faint in the panel of $c$: the value that the note prints for $c^*$. In the right panel: what each loss would have lost there."}, "image": {"alt": "Four panels against the training step. The traces of a, b and c of both losses from all seeds run together onto the dotted optimum; c settles at 0.71, well above the printed 0.5. The excess losses fall from about one to about one thousandth of a nat, far below the price of stopping at c equal to 0.5."}}
figure, axes = plt.subplots(1, 4, figsize=(7.6, 2.5))
for (name, q), colour, line in zip(affine.items(), (PQ, QP), ("-", "--"), strict=True):
    a, b, c = torch.stack(q.path)[:, :, 0].unbind(-1)
    c, offset = c.exp(), 2 * (a - 0.5) ** 2 + b**2  # mean squared error of the mean, x ~ N(0, 2)
    r = c / optimum[2] if name == "qp" else optimum[2] / c
    excess = (r**2 - 1) / 2 - r.log() + offset / (2 * c**2 if name == "pq" else 1.0)
    for ax, trace in zip(axes, (a, b, c, excess), strict=True):
        ax.plot(trace, color=colour, ls=line, lw=1)
    axes[0].plot([], [], color=colour, ls=line, label=name)
    pair = (Normal(0.0, 0.5), Normal(0.0, optimum[2]))  # what the note prints, what is right
    price = kl_divergence(*(pair if name == "qp" else pair[::-1]))
    axes[3].axhline(price, color=colour, ls=":", lw=1)
    print(f"c = 0.5 instead of c = {optimum[2]:.4f} costs {price:.4f} nats of {name} loss")
for ax, target in zip(axes, (*optimum, None), strict=True):
    if target is not None:
        ax.axhline(target, **plotting.LINES["reference"])
axes[2].axhline(0.5, **plotting.LINES["reference"] | {"alpha": 0.5})
for ax, title in zip(axes, ("$a$", "$b$", "$c$", "excess loss (nats)"), strict=True):
    ax.set(title=title, xlabel="step", xlim=(-0.02 * num_steps, 0.4 * num_steps))
axes[0].legend(fontsize=8)
axes[3].set(yscale="log", ylim=(1e-5, 20))
plt.show()

# %% [markdown]
# Every seed and both losses find the corrected value. Stopping at the printed one would have cost what the figure says,
# $-\log r + (r^2 - 1)/2$ for qp and $\log r + (r^{-2} - 1)/2$ for pq with $r = c / c^*$: more for the loss that wants everything covered.
#
# (sec-pq-mixture)=
# ## Example 2: a mixture, and a family that is too small
#
# Back to the two clusters, now for all $x$ at once.
# A network with two outputs gives $q_\phi(z \mid x) = \mathcal{N}\bigl(z;\, m_\phi(x),\, s_\phi(x)^2\bigr)$. The note has a network for each, $\eta^1$ and $\eta^2$, and its second one returns the variance $s^2$.
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
class GaussianNetworks(nn.Module):
    def __init__(self, input_scale=1.0):
        super().__init__()
        self.networks = encoders.ParallelPerceptrons(num_seeds, 1, 16, 16, 2)
        self.input_scale = input_scale

    def forward(self, x):
        mean, log_scale = self.networks(x / self.input_scale).chunk(2, dim=-1)
        return Independent(Normal(10 * mean, 10 * log_scale.exp()), 1)


# %%
cover, seek, tenth = GaussianNetworks(), GaussianNetworks(), GaussianNetworks(input_scale=10.0)
fit(cover, pq, mixture)
fit(tenth, pq, mixture)
warm, warm_tenth = copy.deepcopy(cover), copy.deepcopy(tenth)  # qp, from what pq has trained
trained = (cover, tenth, seek, warm, warm_tenth)
for encoder in trained[2:]:
    fit(encoder, qp, mixture, step_size=0.005)

# %% [markdown]
# We trained pq twice and qp three times, for reasons that the average divergences make plain.
# Below they are averaged over $p(x)$, by quadrature, beside the best that a Gaussian can do for each $x$ alone.


# %%
@torch.no_grad()
def at(encoder, x):
    return encoder(x.expand(num_seeds, -1, 1))


def best_gaussians(x):
    exact = mixture.posterior(x)
    larger = exact.mixture_distribution.probs.argmax(-1)[:, None, None]
    mode = exact.component_distribution.mean.gather(1, larger)[:, 0]
    pairs = ((exact.mean, exact.stddev), (mode, torch.full_like(mode, (100 / 101) ** 0.5)))
    return [Independent(Normal(mean, scale), 1) for mean, scale in pairs]


# %%
x_grid = torch.linspace(-60, 60, 1201).unsqueeze(-1)
density = mixture.log_evidence(x_grid).softmax(0)  # p(x) on the grid, sum 1
names = ("pq", "pq, fed x/10", "qp, random start", "qp, from pq", "qp, from pq, fed x/10")
fitted = {n: at(encoder, x_grid) for n, encoder in zip(names, trained, strict=True)}
fitted |= zip(("optimum of pq", "optimum of qp"), best_gaussians(x_grid), strict=True)
kl = {n: [(density * k).sum(-1) for k in divergences(q, x_grid)] for n, q in fitted.items()}
rows = [[n, *(", ".join(f"{v:.3f}" for v in k.flatten()) for k in pair)] for n, pair in kl.items()]
fed_x, fed_tenth = (kl[name][1] for name in names[3:])
claim("qp ends higher if fed x/10, whatever the seed", fed_tenth.min() > fed_x.max())
results.markdown_table(["encoder", "mean KL(p‖q), each seed", "mean KL(q‖p), each seed"], rows)

# %% [markdown]
# Read the first row and the last but one: pq reaches its optimum with every seed.
# Read the columns: each loss buys its own divergence and pays with the other, many times over.
# Read the third row: from a random start, qp may end far above its optimum.
# {numref}`fig-pq-motion` showed two local optima for one $x$: whatever mode $q$ is in when it has become narrow, it keeps.
# Amortisation makes that one choice for all $x$, because a network that has learned a mode for some observations offers it to the others.
# The remedy is to arrive from the covering side. The pq encoder is wide and centred on the posterior mean, which has the sign of the larger mode;
# from there qp closes in on the right one. Only near $x = 0$, where it matters least, is the choice left to the seed,
# and there a smooth network must pass between the modes.
#
# The remaining rows concern the input. As $x$ has a scale of 11, it would be usual to feed a network $x / 10$, lest its hidden units saturate.
# pq does not mind. qp does: its optimal mean jumps by ten as $x$ changes sign, and a network that sees $x / 10$ needs ten times the weights for a jump as steep.
# In this many steps it rounds the jump, or gives it up and takes one mode for all $x$; the cell asserts that every seed ends above all those that were fed $x$.
# Patience helps: with ten thousand steps of size 0.001 most such networks find the jump too, from the covering side. That is seven times as many steps, and not for a page that runs in a minute.
# So this example feeds $x$ as it is. Example 3, whose outputs are smooth in $x$, feeds $x / 10$.
#
# Now $x$ by $x$. Of the mean we show the absolute value, because at $x = 0$ the two modes tie; errors are the largest of any seed.

# %%
x_test = torch.tensor([0.0, 5.0, 10.0, 20.0, 30.0, 50.0, 80.0]).unsqueeze(-1)
rows = []
for name, encoder, best in zip(("pq", "qp"), (cover, warm), best_gaussians(x_test), strict=True):
    q, columns = at(encoder, x_test), [x_test]
    for truth, learned in ((best.mean.abs(), q.mean.abs()), (best.stddev, q.stddev)):
        columns += [truth, learned.mean(0), (learned - truth).abs().amax(0)]
    rows += [[name, int(x), *row] for x, *row in torch.cat(columns, -1).tolist()]
titles = ["best mean", "mean of seeds", "error", "best scale", "mean of seeds", "error"]
results.markdown_table(["loss", "$x$", *titles], rows, decimals=3)

# %% [markdown]
# ### Where the scale should have dropped
#
# The note wonders at the pq scale for large $x$: it "would actually make more sense" if it fell to the value of qp.
# It would, and the optimum does fall. The learned scale stays behind, from $|x| \approx 30$ on. How often does training go there?
# Nothing is wrong with the loss. But {eq}`eq-pq-frame` weights every error with $f(x)$, and $f = p$ is nearly zero out there.
# So change $f$ and leave all else as it is: draw $x \sim \mathcal{N}(0, 40^2)$, and $z$ from the posterior at that $x$, which this toy model lets us do.
# (The other way to change $f$, the weight $w(x)$, is for {ref}`ex-pq-weight`.)
#
# A scale is learned from draws, and even this proposal puts only one in twenty beyond $|x| = 80$. With 200 observations a step instead of 1,000
# the scale at $x = 80$ scatters over the seeds by several per cent, and a seed now and then misses the bound that the next cell asserts.


# %%
# NBVAL_CHECK_OUTPUT
def pq_wide(encoder):
    x = 40 * torch.randn(num_seeds, batch_size, 1)
    return objectives.pq_loss(encoder, x, mixture.posterior(x).sample())


wide = GaussianNetworks()
fit(wide, pq_wide)
x_usual = x_test[1:4]  # 5, 10 and 20
for name, encoder, best in zip(("pq", "qp"), (cover, warm), best_gaussians(x_usual), strict=True):
    q = at(encoder, x_usual)
    off = [(q.mean - best.mean).abs().max() / 0.2, (q.stddev / best.stddev - 1).abs().max() / 0.05]
    claim(f"{name} on p(x): means within 0.2, scales within 5 % at x = 5, 10, 20", max(off) < 1)
for bound in (30.0, 40.0):
    draws = num_steps * batch_size * density[x_grid[:, 0].abs() > bound].sum()
    print(f"|x| > {bound:.0f}: about {draws:.0f} of {num_steps * batch_size:,} draws from p(x)")
exact = mixture.posterior(x_test).stddev[-2:]
ratio_narrow, ratio_wide = (at(q, x_test).stddev[:, -2:] / exact for q in (cover, wide))
claim("pq on p(x): scales at x = 50 and 80 at least 50 % too wide", ratio_narrow.min() > 1.5)
claim("pq on the wide proposal: within 10 %", (ratio_wide - 1).abs().max() < 0.1)

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-mixture", "caption": "Example 2, every seed. Top: posterior (filled) and learned Gaussians at five observations: pq covers, qp seeks, and at $x = 50$, with one mode left, pq is still too wide. Bottom: the network outputs against $x$; wide pale lines are the optima {eq}`eq-pq-optima`. Dotted: pq trained on the wide proposal. Shaded: the two densities of training observations, not to one scale. The scale drops where training looks."}, "image": {"alt": "Top: five panels for x from 0 to 50. The posterior goes from two equal peaks to one; pq Gaussians are wide and centred between the peaks, qp Gaussians sit on the larger peak. Bottom left: pq means follow an S-shaped curve, qp means jump from minus 5 to plus 5 at zero. Bottom right: qp scales are constant near 1; pq scales peak at 5 and follow their optimum to about x = 30, then stay above 2, while those trained on the wide proposal follow it down to 1."}}
x_wide = torch.linspace(-80, 80, 321).unsqueeze(-1)
learners = ((cover, PQ, "-", "pq"), (warm, QP, "--", "qp"), (wide, PQ, ":", "pq, wide proposal"))


def show_posterior(ax, model, x, encoders):
    """Exact p(z | x), filled, and the encoders of all seeds."""
    exact = model.posterior(x).log_prob(z_grid).exp()
    ax.fill_between(z_grid[:, 0], exact, color=EXACT, alpha=0.35, lw=0)
    for encoder, colour, line, _ in encoders:
        density = at(encoder, x).log_prob(z_grid[:, None, None]).exp()
        ax.plot(z_grid, density[..., 0], color=colour, ls=line, lw=1)
    ax.set(xlim=(-12, 12), xlabel="$z$", title=f"$x = {x.item():g}$")


figure, axes = plt.subplot_mosaic("01234;mmsss", figsize=(7.6, 5.2), height_ratios=(2, 3))
for panel, x in zip("01234", (0.0, 5.0, 10.0, 20.0, 50.0), strict=True):
    show_posterior(axes[panel], mixture, torch.tensor([[x]]), learners[:2])
    axes[panel].set(ylim=(0, 0.45), yticks=() if panel > "0" else (0, 0.2, 0.4))
curves = [
    (q, c, {"lw": 5, "alpha": 0.25}) for q, c in zip(best_gaussians(x_wide), (PQ, QP), strict=True)
]
curves += [(at(encoder, x_wide), c, {"ls": line, "lw": 1}) for encoder, c, line, _ in learners]
for q, colour, style in curves:
    for panel, output in (("m", q.mean), ("s", q.stddev)):
        axes[panel].plot(x_wide, output.reshape(-1, len(x_wide)).T, color=colour, **style)
for log_p in (mixture.log_evidence(x_wide), Normal(0.0, 40.0).log_prob(x_wide[:, 0])):
    shade = 0.9 * (log_p - log_p.max()).exp()
    axes["s"].fill_between(x_wide[:, 0], shade, color=plotting.GREY, alpha=0.2, lw=0)
axes["m"].set(xlabel="$x$", title="mean $m(x)$")
axes["s"].set(xlabel="$x$", title="scale $s(x)$", ylim=(0, 6.5))
handles = [plt.Line2D([], [], color=c, ls=line, label=label) for _, c, line, label in learners]
axes["s"].legend(handles=handles, fontsize=8, ncols=3)
plt.show()

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
# We write a run of the program, its *trace*, as a row of numbers: here $(c, z)$.
# The pq loss asks a distribution over traces for `log_prob` and nothing else.


# %%
class Branches(MixtureSameFamily):
    """A mixture that is asked for the density of (branch, z), and not of z alone."""

    def log_prob(self, trace):
        branch, z = trace[..., 0].long(), trace[..., 1:]
        log_z = self.component_distribution.log_prob(z.unsqueeze(-2))
        log_z = log_z.gather(-1, branch.unsqueeze(-1)).squeeze(-1)
        return self.mixture_distribution.log_prob(branch) + log_z

    def marginal(self):
        return MixtureSameFamily(self.mixture_distribution, self.component_distribution)


# %%
class ComponentEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.component = encoders.ParallelPerceptrons(num_seeds, 1, 16, 16, 2)
        self.value = encoders.ParallelPerceptrons(num_seeds, 3, 16, 16, 2)  # of x and one-hot c

    def forward(self, x):
        pairs = [torch.cat([x / 10, c.expand(*x.shape[:-1], 2)], -1) for c in torch.eye(2)]
        mean, log_scale = torch.stack([*map(self.value, pairs)], -2).split(1, dim=-1)
        values = Independent(Normal(10 * mean, log_scale.exp()), 1)
        return Branches(Categorical(logits=self.component(x / 10)), values)


# %% [markdown]
# The qp loss meets its first obstacle: no gradient passes through a draw of $c$.
# With two values there is no need to draw. The sum over $c$ is exact, and $z$ stays reparameterised inside each branch:
#
# $$
# \ell_{qp}(x) = \sum_{c} q_\phi(c \mid x)\; \mathbb{E}_{q_\phi(z \mid x, c)}\bigl[\log q_\phi(c, z \mid x) - \log p(c, z, x)\bigr].
# $$ (eq-pq-sum)
#
# The weight $q_\phi(c \mid x)$ in front hides the old danger: a branch that looks improbable before it has learned where to go gets no gradient, and stays improbable.
# So qp starts once more from the encoder that pq has trained, in which every branch has been visited.

# %%
# NBVAL_CHECK_OUTPUT
clusters = torch.tensor([[-5.0], [5.0]])


def clustered():
    c = torch.randint(2, (num_seeds, batch_size, 1))
    z = torch.normal(clusters[c[..., 0]], 1.0)
    return torch.normal(z, 10.0), torch.cat([c, z], -1)


def qp_sum(encoder):
    x, _ = clustered()
    c, value = (q := encoder(x)).mixture_distribution, q.component_distribution
    z = value.rsample()  # one draw in each branch, [S, B, 2, 1]
    log_p = (
        math.log(0.5)
        + Normal(clusters, 1.0).log_prob(z)
        + Normal(z, 10.0).log_prob(x.unsqueeze(-2))
    )
    return (c.probs * (c.logits + value.log_prob(z) - log_p.squeeze(-1))).sum(-1)


joint = {"pq": ComponentEncoder()}
fit(joint["pq"], lambda encoder: objectives.pq_loss(encoder, *clustered()), step_size=0.02)
joint["qp"] = copy.deepcopy(joint["pq"])
fit(joint["qp"], qp_sum)
x_few = x_test[:5]
exact = mixture.posterior(x_few)
near = exact.mixture_distribution.probs > 0.1  # branches that matter
for name, encoder in joint.items():
    value, truth = at(encoder, x_few).component_distribution, exact.component_distribution
    error_mean = (value.mean - truth.mean)[:, near].abs().max()
    error_scale = (value.stddev - truth.stddev)[:, near].abs().max()
    claim(f"{name}: means and scales of z within 0.2", max(error_mean, error_scale) < 0.2)

# %%
truth = exact.mixture_distribution.probs[:, 1:]
columns = [x_few, truth]
for name, encoder in joint.items():
    learned = at(encoder, x_few).mixture_distribution.probs[..., 1:]
    columns += [learned.mean(0), (learned - truth).abs().amax(0)]
    error = branch_error(encoder, mixture, x_grid[300:901])
    claim(f"{name}: P(+ | x) within 0.03, for all |x| <= 30 and every seed", error < 0.03)
titles = ["$x$", "$P(+ \\mid x)$", "pq: mean of seeds", "error", "qp: mean of seeds", "error"]
rows = [[int(x), *row] for x, *row in torch.cat(columns, -1).tolist()]
results.markdown_table(titles, rows, decimals=3)

# %% [markdown]
# So the pq "defect" of example 2 was the family's, and the qp one too; {numref}`fig-pq-joint` shows the rest of the outputs.
# At $x = 30$, where observations are rare, qp comes closer: each of them tells qp the whole density, and pq a single draw from it.
#
# A good encoder is also a good proposal. The note draws the posterior by resampling importance samples:
# draw from $q$, weight by $p(z, x) / q(z \mid x)$, resample. We do so at $x = 10$ with three proposals, and watch the effective sample size (ESS).


# %%
def resample(q, x, num=num_draws):
    z = q.sample((num,))  # [K, S, 1, 1]
    log_weights = mixture.log_joint(x, z) - q.log_prob(z)
    chosen = torch.multinomial(log_weights[:, 0, 0].softmax(0), num, replacement=True)
    return z[chosen, 0, 0, 0], numerics.effective_sample_size(log_weights)[0, 0] / num


names = ("example 2, pq", "example 2, qp", "example 3, pq")
proposals = at(cover, x_shown), at(warm, x_shown), at(joint["pq"], x_shown).marginal()
draws = {n: resample(q, x_shown) for n, q in zip(names, proposals, strict=True)}
rows = [[n, f"{ess:.0%}", float((z > 0).float().mean())] for n, (z, ess) in draws.items()]
results.markdown_table(["proposal", "ESS", "resampled $P(z > 0 \\mid x = 10)$"], rows, decimals=3)

# %% [markdown]
# The seeking proposal has a nearly perfect effective sample size, and the wrong answer: {numref}`fig-pq-motion` shows the mode that it does not know, with more than a quarter of the mass.
# Weights can only compare places where $q$ has been. Remember it on the day when a diagnostic looks too good.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-joint", "caption": "Example 3, every seed. Top: posterior of $z$ at four observations, exact (filled), learned by each loss (lines), and a histogram of resampled importance samples from the pq encoder (grey steps). Bottom: the network outputs against $x$, exact values as wide pale lines; the upper and lower branch belong to $c = +$ and $c = -$."}, "image": {"alt": "Top: four panels for x from 0 to 20; learned densities and the histogram lie on the exact two-peaked density. Bottom: the probability of the right cluster is a sigmoid, the two branch means are nearly flat lines near plus and minus 5, the scales are near 1. Learned lines follow exact ones where observations are common."}}
figure, axes = plt.subplot_mosaic("000111222333;ppppmmmmssss", figsize=(7.6, 4.8))
learners = ((joint["pq"], PQ, "-", "pq"), (joint["qp"], QP, "--", "qp"))
marginals = [(lambda x, e=e: e(x).marginal(), *style) for e, *style in learners]
for panel, x in zip("0123", x_few[:4, None], strict=True):
    show_posterior(axes[panel], mixture, x, marginals)
    draws, _ = resample(at(marginals[0][0], x), x)
    axes[panel].hist(draws, bins=60, density=True, histtype="step", color=plotting.GREY, lw=0.8)
    axes[panel].set(ylim=(0, 0.4), yticks=() if panel > "0" else (0, 0.2, 0.4))
x_band = torch.linspace(-40, 40, 161).unsqueeze(-1)
curves = [(mixture.posterior(x_band), EXACT, {"lw": 5, "alpha": 0.3})]
curves += [(at(e, x_band), colour, {"ls": line, "lw": 1}) for e, colour, line, _ in learners]
for q, colour, style in curves:
    c, value = q.mixture_distribution.probs[..., 1], q.component_distribution
    outputs = (c.unsqueeze(-1), value.mean[..., 0], value.stddev[..., 0])
    for panel, output in zip("pms", outputs, strict=True):
        axes[panel].plot(x_band, output.movedim(-2, 0).flatten(1), color=colour, **style)
for panel, title in zip("pms", ("$q(c = + \\mid x)$", "means", "scales"), strict=True):
    axes[panel].set(title=title, xlabel="$x$")
axes["s"].set_ylim(0, 2)
handles = [plt.Line2D([], [], color=c, ls=line, label=label) for _, c, line, label in learners]
axes["p"].legend(handles=handles, fontsize=8)
plt.show()

# %% [markdown]
# ### When the sum is too long
#
# With many discrete variables no one can sum. Three ways remain to follow $\nabla_\phi \mathbb{E}_{q_\phi(c)}[f(c)]$.
#
# - *Score function* {cite:p}`williams1992reinforce`: $\mathbb{E}[f(c) \nabla \log q_\phi(c)]$. Unbiased for any $c$, and noisy.
# - *The same with a control variate*: subtract from each $f(c_k)$ the mean of the others {cite:p}`mnih2016vimco,kool2019baseline`.
#   It does not depend on $c_k$, so it changes the variance and not the mean.
# - *Relaxation* {cite:p}`maddison2017concrete,jang2017gumbel`: extend $f$ to numbers between 0 and 1, and replace $c$ by a smooth function of noise, here
#   $\operatorname{sigmoid}\bigl((\lambda + \text{logistic noise}) / \tau\bigr)$, and differentiate through it. Biased, the more so the larger $\tau$.
#
# Each estimator below gets two evaluations of $f$. They estimate the derivative of the bound in one logit $\lambda$ at $x = 10$, for an encoder that is half trained:
# the branches are one unit off and too wide.

# %%
logit = torch.zeros(num_draws, requires_grad=True)  # one copy for each replicate
noise, logistic = torch.randn(2, num_draws), torch.rand(2, num_draws).logit()
means, exact = torch.tensor([-3.9, 6.1]), mixture.posterior(x_shown)
kl_z = kl_divergence(Independent(Normal(means[:, None], 1.5), 1), exact.component_distribution)
truth = float(0.25 * (exact.mixture_distribution.logits - kl_z).diff())


def log_q(c):  # c may be relaxed: a number between 0 and 1
    return c * nn.functional.logsigmoid(logit) + (1 - c) * nn.functional.logsigmoid(-logit)


def f(c, noise=noise):
    q = Normal(means[0] + c * means.diff(), 1.5)
    z = q.mean + 1.5 * noise
    log_p = math.log(0.5) + Normal(10 * c - 5, 1.0).log_prob(z) + Normal(z, 10.0).log_prob(x_shown)
    return log_p - log_q(c) - q.log_prob(z)


both, c = torch.tensor([[0.0], [1.0]]), torch.randint(2, (2, num_draws)).float()
bounds = {
    "exact sum": (log_q(both).exp() * f(both)).sum(0),
    "exact sum, noise of z shared": (log_q(both).exp() * f(both, noise[:1])).sum(0),
    "score function": objectives.score_function_surrogate(f(c), log_q(c), baseline=False),
    "score function, control variate": objectives.score_function_surrogate(f(c), log_q(c)),
    "relaxation, temperature 1": f((logit + logistic).sigmoid()).mean(0),
    "relaxation, temperature 0.5": f(((logit + logistic) / 0.5).sigmoid()).mean(0),
}
grads = {n: torch.autograd.grad(b.sum(), logit, retain_graph=True)[0] for n, b in bounds.items()}
rows = [
    [n, float(g.mean()) - truth, float(g.std()) / num_draws**0.5, float(g.std())]
    for n, g in grads.items()
]
results.markdown_table(
    ["two evaluations of f", "bias", "± its error", "spread of one estimate"], rows, 3
)

# %% [markdown]
# With the noise of $z$ shared between its two terms, the exact sum is quieter than everything else by far; without, what noise it has comes from $z$ alone.
# The control variate halves the spread of the score function for the price of a subtraction.
# The relaxation is quiet and misses the target, by less at the lower temperature and with more spread.
# ({cite:t}`tucker2017rebar` and {cite:t}`grathwohl2018relax` use a relaxation as the control variate, and lose the bias.)
# And pq? It had no need of any of this.
#
# (sec-pq-universe)=
# ## Example 4: an open universe
#
# Now the number of variables is itself random. First $n \in \{1, 2\}$ is drawn.
# If $n = 1$ then $z \sim \mathcal{N}(0, 1)$; if $n = 2$ a cluster $c$ is drawn and $z \sim \mathcal{N}(\pm 5, 1)$. We see $x \sim \mathcal{N}(z, 1)$.
# The text of the note does not keep its own lists for this model; the settings are those of its author's next programs.
#
# Each branch of the program has its network: one for $P(n \mid x)$, one for $P(c \mid x, n = 2)$, and one for mean and scale of $z$ on either side.
# `Branches` serves unchanged, with three paths whose log-probabilities are sums along the way. So does `pq_loss`: it never asks what a trace contains.


# %%
def open_universe():
    n = torch.randint(1, 3, (num_seeds, batch_size, 1))
    c = torch.randint(2, n.shape)  # idle when n = 1
    z = torch.normal(torch.where(n == 1, 0.0, 10.0 * c - 5.0), 1.0)
    path = torch.where(n == 1, 0, 1 + c)
    return torch.normal(z, 1.0), torch.cat([path, z], -1)


class UniverseEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = ((1, 1), (1, 1), (1, 2), (3, 2))  # n; c; z given n = 1; z given n = 2 and c
        networks = [encoders.ParallelPerceptrons(num_seeds, i, 8, 8, o) for i, o in sizes]
        self.count, self.component, self.single, self.value = nn.ModuleList(networks)

    def forward(self, x):
        log_two, log_one = (nn.functional.logsigmoid(s * self.count(x)) for s in (1, -1))
        log_c = [nn.functional.logsigmoid(s * self.component(x)) for s in (-1, 1)]
        logits = torch.cat([log_one, *(log_two + log_prob for log_prob in log_c)], -1)
        pairs = [torch.cat([x, c.expand(*x.shape[:-1], 2)], -1) for c in torch.eye(2)]
        outputs = torch.stack([self.single(x), *map(self.value, pairs)], -2)
        mean, log_scale = outputs.split(1, dim=-1)
        return Branches(Categorical(logits=logits), Independent(Normal(mean, log_scale.exp()), 1))


# %%
weights, centres = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([0.0, -5.0, 5.0])
universe = models.GaussianMixture(weights, centres, torch.ones(3), 1.0)  # n and c summed out
universe.requires_grad_(False)
opener = UniverseEncoder()
fit(opener, lambda encoder: objectives.pq_loss(encoder, *open_universe()), step_size=0.02)

x_opened = torch.tensor([0.0, 1.0, 2.0, 2.5, 3.0, 5.0, 8.0]).unsqueeze(-1)
exact, q, columns = universe.posterior(x_opened), at(opener, x_opened), [x_opened]
for truth, learned in (
    (exact.mixture_distribution.probs[:, :1], q.mixture_distribution.probs[..., :1]),
    (exact.mean, q.mean),
    (exact.stddev, q.stddev),
):
    columns += [truth, learned.mean(0), (learned - truth).abs().amax(0)]
x_band = torch.linspace(-8, 8, 161).unsqueeze(-1)
error = branch_error(opener, universe, x_band)
claim("the probability of every path within 0.05, for all |x| <= 8 and every seed", error < 0.05)
titles = [
    t for name in ("$P(n = 1 \\mid x)$", "mean", "scale") for t in (name, "mean of seeds", "error")
]
rows = [[f"{x:g}", *row] for x, *row in torch.cat(columns, -1).tolist()]
results.markdown_table(["$x$", *titles], rows, decimals=3)

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-universe", "caption": "Example 4: inferred and true posteriors. Left: over the number of clusters and, given two, over the component; exact values as wide pale lines, every seed as a thin one. Right: over the value $z$ at three observations, exact (filled) and learned (lines)."}, "image": {"alt": "Left panel: the probability of one cluster is near one for small x and falls to zero beyond 2.8; the probability of the right component is a steep sigmoid. Right panels: densities of z at x equal to 1, 2.5 and 5, with learned lines on the exact shapes, two-peaked at 2.5."}}
figure, axes = plt.subplots(1, 4, figsize=(7.6, 2.8), width_ratios=(2, 1, 1, 1))
for q, style in (
    (universe.posterior(x_band), {"lw": 5, "alpha": 0.3}),
    (at(opener, x_band), {"lw": 1}),
):
    probs = q.mixture_distribution.probs.reshape(-1, len(x_band), 3)
    right = probs[..., 2] / probs[..., 1:].sum(-1)
    axes[0].plot(x_band, probs[..., 0].T, color=PQ, **style)
    axes[0].plot(x_band, right.T, color=QP, ls="-" if style["lw"] > 1 else "--", **style)
lines = [plt.Line2D([], [], color=PQ), plt.Line2D([], [], color=QP, ls="--")]
axes[0].legend(lines, ["$P(n = 1 \\mid x)$", "$P(+ \\mid x, n = 2)$"], fontsize=8, loc="upper left")
axes[0].set(xlabel="$x$", ylim=(-0.03, 1.55), yticks=(0, 0.5, 1))
learners = [(lambda x: opener(x).marginal(), PQ, "-", "pq")]
for ax, x in zip(axes[1:], (1.0, 2.5, 5.0), strict=True):
    show_posterior(ax, universe, torch.tensor([[x]]), learners)
    ax.set(xlim=(-3, 8))
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
# The wake-$\phi$ gradient tends to the gradient of a divergence that does not vanish, so its ratio rises as $K^{1/2}$,
# and faster at first, because a single particle has no signal at all ({ref}`ex-pq-one`).
# {cite:t}`tucker2019dreg` repair the gradient of $\mathcal{L}_K$. We measure all three in example 1, at an encoder whose offset and scale are wrong.


# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-snr", "caption": "Signal-to-noise ratio of one encoder gradient (norm of its mean over the root of its total variance) against the number of particles, in example 1. Grey guides have slopes $+\\tfrac12$ and $-\\tfrac12$; the printed exponents are between the first and the last point."}, "image": {"alt": "Log-log plot. The ratio falls with slope about one half for the plain importance-weighted bound, and rises with slope about one half for its doubly reparameterised gradient and for wake-phi."}}
def signal_to_noise(surrogate, num_samples):
    phi = torch.tensor([0.5, 0.3, 0.0]).repeat(num_draws, 1).requires_grad_()  # a, b, log c
    x = torch.full((num_draws, 1), 1.5)
    q = Independent(Normal(phi[:, :1] * x + phi[:, 1:2], phi[:, 2:].exp()), 1)
    surrogate(unknown_mean, q, x, num_samples).sum().backward()
    return float(phi.grad.mean(0).norm() / phi.grad.var(0).sum().sqrt())


particles = (2, 4, 8, 16, 32)
figure, ax = plt.subplots(figsize=(5.6, 3.0))
for name, surrogate, mark, colour in (
    ("IWAE", objectives.iwae_bound, "o--", QP),
    ("IWAE, doubly reparameterised", objectives.dreg_surrogate, "s:", plotting.COLOURS["samples"]),
    ("wake-φ", objectives.wake_phi_loss, "D-", PQ),
):
    ratio = [signal_to_noise(surrogate, k) for k in particles]
    ax.loglog(particles, ratio, mark, color=colour, label=name)
    print(
        f"{name}: K^{math.log(ratio[-1] / ratio[0]) / math.log(particles[-1] / particles[0]):.2f}"
    )
for slope in (-0.5, 0.5):
    guide = [0.25 * (k / particles[0]) ** slope for k in particles]
    ax.loglog(particles, guide, **plotting.LINES["reference"])
ax.set(xlabel="particles $K$", ylabel="signal / noise", xticks=particles, xticklabels=particles)
ax.minorticks_off()
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## When the model is wrong, or still being learned
#
# **The data come from elsewhere.** Let three in ten observations come from a faulty sensor, $x \sim \mathcal{N}(60, 5^2)$, while the model stays as in {ref}`sec-pq-mixture`.
# Its posterior there is still well defined: one mode, scale close to 1. Which encoder knows it?
# pq was trained on the model's dreams and has never seen such an $x$. We go on from the pq encoder in three ways: with qp on the data,
# with wake-$\phi$ on the data, and with equal parts of wake-$\phi$ on the data and pq on dreams, as {cite:t}`bornschein2015rws` do.


# %%
def observed():
    x, _ = simulate(mixture)
    return torch.where(torch.rand_like(x) < 0.3, torch.normal(60.0, 5.0, x.shape), x)


def wake(encoder):
    x = observed()
    return objectives.wake_phi_loss(mixture, encoder(x), x, num_samples=10)


on_data = {
    "qp": lambda q: objectives.qp_loss(mixture, q(x := observed()), x),
    "wake-φ, K = 10": wake,
    "wake-φ, K = 10, and sleep": lambda q: 0.5 * wake(q) + 0.5 * pq(q, mixture),
}
entrants = {"pq, before": cover} | {name: copy.deepcopy(cover) for name in on_data}
for name, loss in on_data.items():
    fit(entrants[name], loss, step_size=0.005)

x_faulty = torch.linspace(40, 80, 81).unsqueeze(-1)
regions = ((x_grid, density), (x_faulty, Normal(60.0, 5.0).log_prob(x_faulty[:, 0]).softmax(0)))
errors = {
    name: [(weight * kl).sum(-1) for x, weight in regions for kl in divergences(at(q, x), x)]
    for name, q in entrants.items()
}
claim("wake-φ alone loses a mode, for every seed", errors["wake-φ, K = 10"][0].min() > 5)
claim("wake-φ and sleep do not", errors["wake-φ, K = 10, and sleep"][0].max() < 1)
rows = [[name, *(float(value.mean()) for value in error)] for name, error in errors.items()]
results.markdown_table(
    ["encoder", "model's x: KL(p‖q)", "KL(q‖p)", "faulty x: KL(p‖q)", "KL(q‖p)"], rows, 3
)

# %% [markdown]
# (Means over the seeds.) Everyone who saw the faulty $x$ is right about it. The surprise is in the first column: wake-$\phi$ with ten particles *seeks*.
# Its bias of order $1/K$ has a direction. A narrow $q$ hears only of the mode it sits on, and its own weights tell it that all is well.
# Dreams bring the other mode back: sleep keeps the encoder honest where the model lives, wake where the data are.

# **The model is being learned.** Now $\theta$ moves too. Let the cluster centres $\pm\mu$ be unknown, the data come from $\mu = 5$, and give every loss the best Gaussian encoder there is, {eq}`eq-pq-optima`.
# qp then maximises $\mathbb{E}[\log p_\theta(x)] - \mathbb{E}[\operatorname{KL}(q^* \,\|\, p)]$, and the second term depends on $\theta$:
# the model can please its encoder by moving the clusters apart, so that one mode is all there is.
# With $K$ particles from the covering encoder, wake-$\theta$ ascends $\mathcal{L}_K$.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-pq-theta", "caption": "What each objective prefers for the cluster centre $\\mu$, with the best encoder at each $\\mu$; a triangle marks each maximum, printed above. The data come from $\\mu = 5$ (dotted)."}, "image": {"alt": "Objectives against the centre mu. The evidence peaks at 5. The qp bound with its best Gaussian peaks at 9. The importance-weighted bounds from the covering encoder peak far below 5 for ten particles and approach 5 as particles are added."}}
centres, particles = torch.arange(1.0, 13.1, 0.5), (10, 100, 1000)
x_data, weight = x_grid[::10], density[::10] / density[::10].sum()
curves = {name: [] for name in ("log p(x)", "qp", *(f"wake-θ, K = {k}" for k in particles))}
for centre in centres:
    theta = models.GaussianMixture(torch.ones(2), centre * clusters[:, 0] / 5, torch.ones(2), 10.0)
    exact = theta.requires_grad_(False).posterior(x_data)
    q = Independent(Normal(exact.mean, exact.stddev), 1)
    evidence = theta.log_evidence(x_data)
    values = [evidence, evidence + exact.mixture_distribution.probs.amax(-1).log()]
    for k in particles:
        torch.manual_seed(seed)  # common random numbers for all centres
        values.append(-objectives.wake_theta_loss(theta, q, x_data, k))
    for curve, value in zip(curves.values(), values, strict=True):
        curve.append(float((weight * value).sum()))
figure, ax = plt.subplots(figsize=(6.0, 3.2))
looks = [(EXACT, "-"), (QP, "--"), (PQ, ":"), (PQ, "-."), (PQ, "-")]
for (name, curve), (colour, line) in zip(curves.items(), looks, strict=True):
    best = torch.tensor(curve).argmax()
    ax.plot(centres, curve, color=colour, ls=line, label=name)
    ax.plot(centres[best], curve[best], "v", color=colour)
    print(f"{name}: best at {centres[best]:.1f}")
print(f"mean of |x|: {(weight * x_data[:, 0].abs()).sum():.2f}")
ax.axvline(5, **plotting.LINES["reference"])
ax.set(xlabel="centre $\\mu$ of the model", ylabel="objective in nats", ylim=(-4.6, -3.8))
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# qp does not stop at 5 but at the mean of $|x|$, where hard assignment of each $x$ to one cluster would put it. It is a bias of the bound; no amount of data removes it, a richer $q$ would.
# The covering encoder errs on the other side, since what it covers between the clusters costs the least when they are close. But this bias shrinks with every particle.
#
# ## How far to trust this page
#
# Each ✓ above is an assertion: with a seed for which it fails, the chapter stops there. The settings were chosen with some seeds in view.
# When they were final we fixed five that had never been used, 101 to 105, and ran the whole chapter with each, at default size.
# Every assertion held with every one of them. What is not asserted did vary: which networks find the jump of qp from a random start, which give it up when they are fed $x / 10$,
# and the centre that wake-$\theta$ prefers with a thousand particles. To repeat a run, give papermill the option `-p seed 101`.
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
# NBVAL_CHECK_OUTPUT
def price(r):
    return -math.log(r) + (r**2 - 1) / 2, math.log(r) + (r**-2 - 1) / 2


narrow, right = Normal(0.0, 0.5), Normal(0.0, math.sqrt(0.5))
checks.close(price(math.sqrt(0.5))[0], kl_divergence(narrow, right), label="the qp price")
checks.close(price(math.sqrt(0.5))[1], kl_divergence(right, narrow), label="the pq price")
for r in (0.5, 2.0):
    print(f"r = {r}: qp {price(r)[0]:.3f} nats, pq {price(r)[1]:.3f} nats")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Weight instead of proposal
# :label: ex-pq-weight
# {numref}`fig-pq-mixture` changed $\pi$. Change $w$ instead: draw $(z, x)$ from the model, and multiply each pq loss by $w(x) = \mathcal{N}(x; 0, 40^2) / p(x)$.
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
# No. Observations beyond $|x| = 40$ carry a third of $f$, and the model hardly ever draws one. How many draws count hangs on the few that fell far out: from one in twenty to hardly any, as the seed has it. And beyond $|x| = 60$, where $f$ still has an eighth of its mass, there is no draw to be weighted.

# %%
x, _ = mixture.sample(num_draws)
log_weights = Normal(0.0, 40.0).log_prob(x[:, 0]) - mixture.log_evidence(x)
size = float(numerics.effective_sample_size(log_weights))
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
        self.networks = encoders.ParallelPerceptrons(num_seeds, 1, 16, 16, 2)

    def forward(self, x):
        mean, log_scale = self.networks(torch.log1p(x)).chunk(2, dim=-1)
        return Independent(Normal(mean, log_scale.exp()), 1)


def simulate_counts():
    z = torch.randn(num_seeds, batch_size, 1)
    return torch.poisson((1 + z).exp()), z


count_encoder = CountEncoder()
fit(count_encoder, lambda encoder: objectives.pq_loss(encoder, *simulate_counts()))

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
# ```{exercise} Twenty components, a project
# :label: ex-pq-project
# {cite:t}`le2019rws` learn the weights of a mixture with twenty components, $c \sim \operatorname{Discrete}(\theta)$, $x \mid c \sim \mathcal{N}(10 c, 5^2)$, from data, with a network $q(c \mid x)$.
# Train it with `wake_theta_loss` and `wake_phi_loss` for $K = 2, 5, 10, 20$, and with the score function on $\mathcal{L}_K$. Plot the error of $\theta$ against $K$ for ten seeds. Which method does {numref}`fig-pq-snr` predict to win?
# ```
#
# ```{solution} ex-pq-project
# :label: sol-pq-project
# :class: dropdown
# The model needs `log_joint(x, c)` with the logits of $\theta$ as its parameter, and the encoder returns a distribution whose draws are $c$; both wake losses then work as they are, because they never differentiate a draw.
# Normalise $\theta$ by a softmax. The figure predicts that wake-$\phi$ gains from every particle, and that the encoder's gradient of $\mathcal{L}_K$ loses.
# {cite:t}`le2019rws` find just that. Watch $K = 2$: wake-$\phi$ alone may give up components, as it gave up a mode above. Then let it dream as well.
# A good self-check is the data's own marginal: $\sum_c \theta_c\, \mathcal{N}(x; 10c, 5^2)$ against a histogram.
# ```
#
# ## References
#
# ```{bibliography}
# :filter: docname in docnames
# ```
