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

# %% [markdown] tags=["slide"]
# # Iterative inference: learning to infer
#
# *An encoder that looks at its own mistake and answers again.*
# Runs in about a minute on one core; needs the evidence lower bound and amortised inference, as in chapter 1.
#
# A standard encoder is asked once. It sees an image, names a posterior, and never learns whether that posterior was any good.
# Local optimisation is the opposite: it looks at the gradient of the bound a hundred times, and starts from nothing for each new image.
# {cite:t}`marino2018iterative` propose something in between, a network that is given the present estimate *and the gradient there*, and returns a better estimate.
# It is an optimiser whose update rule was learned. This chapter takes its three claims in turn:
# that a gradient is as good a thing to encode as the data, that gradients explain why hierarchical models need a top-down pass, and that the result beats standard encoders and hand-made optimisers.
#
# ```{admonition} What you will be able to do
# :class: tip
# - Write local, standard, iterative and semi-amortised inference as one loop with four steps.
# - Derive the gradient of the bound as a random affine map of the observation, and correct three slips that are in print.
# - Separate the bottom-up and the top-down term in a model of two levels, and measure what the second is worth.
# - Race a learned optimiser against tuned ones at equal numbers of gradients, and say where it stops being one.
# - Tell a better posterior from a better model, with decoders crossed with inferences, and with the fact that refinement cannot move $\log p_\theta(x)$.
# ```

# %% tags=["parameters"]
seed: int = 0  # seed of every random stream in the chapter
num_images: int = 200  # random test digits
num_updates: int = 300  # updates of each encoder that is trained on the page
num_steps: int = 300  # steps of the hand-made optimisers
num_grid: int = 81  # points on each side of the surface of the bound
num_importance: int = 1000  # samples behind log p(x)
retrain: bool = False  # train the models here, in some minutes; else load them

# %% tags=["hide-input"]
from amortised import checks

checks.parameters(
    globals(),
    seed=checks.integer(minimum=0, maximum=2**32 - 1),
    num_images=checks.integer(minimum=20, maximum=5000),
    num_updates=checks.integer(minimum=5, maximum=100_000),
    num_steps=checks.integer(minimum=20, maximum=2000),
    num_grid=checks.integer(minimum=11, maximum=201),
    num_importance=checks.integer(minimum=100, maximum=100_000),
    retrain=checks.boolean(),
)

# %% tags=["hide-input"]
import json
from functools import partial

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from torch import nn
from torch.optim import SGD, Adam, RMSprop

from amortised import data, evaluation, plotting, recipes, results, studies, tables
from amortised import iterative as inference
from amortised.iterative import InferenceState, IterativeEncoder, look, refine
from amortised.models import DeepLatentGaussian, LinearGaussian, conditional_normal
from amortised.results import markdown_table, mean_and_se, paired_difference
from amortised.training import fit, half_cosine

torch.distributions.Distribution.set_default_validate_args(False)  # speed
plotting.use_style()
gaussian = inference.gaussian

# %% [markdown] tags=["slide"]
# ## One loop, four ways to infer
#
# The approximation for one observation is $q(z; \lambda) = \mathcal{N}(z; \mu, \operatorname{diag} \sigma^2)$ with $\lambda = (\mu, \log \sigma)$, and its quality is the bound
#
# $$
# \mathcal{L}(\lambda; x) = \mathbb{E}_{q(z; \lambda)}\bigl[\log p_\theta(x \mid z)\bigr]
# - \mathrm{KL}\bigl(q(z; \lambda) \,\Vert\, p(z)\bigr) \le \log p_\theta(x).
# $$ (eq-it-bound)
#
# Inference is the search for its maximum in $\lambda$. Four methods differ only in the step that they repeat:
#
# $$
# \underbrace{\lambda \leftarrow \lambda + \alpha \nabla_\lambda \mathcal{L}}_{\text{local optimisation}}, \qquad
# \underbrace{\lambda \leftarrow f_\phi(x)}_{\text{standard encoder}}, \qquad
# \underbrace{\lambda \leftarrow f_\phi(x, \lambda, \nabla_\lambda \mathcal{L})}_{\text{iterative encoder}},
# $$ (eq-it-steps)
#
# and *semi-amortised* inference {cite:p}`kim2018savae`, which takes its first step by an encoder and the others by gradients.
# So all of them fit into one loop. Here it is in full; the library's {py:func}`amortised.iterative.refine` is the same with checks.


# %% tags=["slide"]
def infer(model, step, x, num_steps):
    """Repeat a step from the prior; the bound of each example after every one."""
    state, bounds = inference.start_at_prior(model, x), []
    for t in range(num_steps + 1):
        state = look(model, state)  # decode: the bound and its gradient
        bounds.append(state.elbo)
        state = state._replace(parameters=step(state), iteration=t + 1)
    return torch.stack(bounds)


# %%
torch.manual_seed(seed)
mixed = torch.randn(6, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])  # alike columns
toy = LinearGaussian(mixed, torch.zeros(6), noise_scale=0.5)
toy.requires_grad_(False)
x_toy, _ = toy.sample(500)
ascent = inference.gradient_ascent(partial(SGD, lr=0.02))

# %% [markdown]
# The step of an encoder, too, is a function from a state (observation, parameters, gradient) to parameters.
# Following the source, an *iterative encoder* mixes its answer $f$ with the parameters that it was given, by a learned gate $g$:
#
# $$
# \lambda_t = g \odot \lambda_{t-1} + (1 - g) \odot f, \qquad (g, f) = \text{heads of a network of }
# \bigl(x, \lambda_{t-1}, \nabla_\lambda \mathcal{L}(\lambda_{t-1})\bigr).
# $$ (eq-it-gate)
#
# With $g = 0$ and $x$ as its only input it is a standard encoder, to the last bit (a test of the library says so); $g = 1$ leaves $\lambda$ as it was.
# The gradient is that of *each example's own bound*. The source's code uses that of the batch mean, which is smaller by the batch size, and for one data set it standardises over the batch, so that an image's posterior depends on its neighbours. Here no statistic of a batch enters.
# Scales go through a smooth bound and not through a clamp.
#
# Training has one subtlety. All inputs are *detached*: no gradient flows from one iteration into the one before. The encoder descends the mean of the T losses, $-\frac1T \sum_t \mathcal{L}(\lambda_t)$, the decoder the last one alone.
# The derivative of $\mathcal{L}(\lambda_t)$ in $\lambda_t$ trains the encoder at iteration $t$, and it is also the encoder's next input. So $T$ iterations need $T + 1$ passes through the decoder and not $2T$. We count them.

# %%
# NBVAL_CHECK_OUTPUT
small = DeepLatentGaussian((2,), 6, "real", num_hidden=8)
calls = []
likelihood = small.likelihood
small.likelihood = lambda z: calls.append(1) or likelihood(z)
for name, inputs in {"iterative": ("x", "gradient"), "standard": ("x",)}.items():
    gated = name == "iterative"
    encoder = IterativeEncoder(2, 6, inputs, gated=gated, num_hidden=8)
    optimizers = [Adam(small.parameters()), Adam(encoder.parameters())]
    for num_iterations in (1, 5):
        calls.clear()
        settings = {"num_iterations": num_iterations}
        inference.iterative_step(x_toy, small, encoder, optimizers, **settings)
        print(f"{name}, T = {num_iterations}: {len(calls)} passes of the decoder")

# %% [markdown] tags=["slide"]
# A standard encoder asks for no look at the decoder before it answers, hence one pass fewer.
#
# ## What the gradient knows
#
# Why should a gradient be worth encoding? Take a Gaussian likelihood with mean $\mu_x(z)$ and scale $\sigma_x$, a prior $\mathcal{N}(\mu_p, \sigma_p^2)$, and a draw $z = \mu + \sigma \odot \varepsilon$. Differentiate {eq}`eq-it-bound` along the path of the draw. With $J = \partial \mu_x / \partial z$,
#
# $$
# \nabla_\mu \mathcal{L} = \mathbb{E}\Bigl[ J^\top \frac{x - \mu_x}{\sigma_x^2} - \frac{z - \mu_p}{\sigma_p^2} \Bigr] = A x + b, \qquad
# A = \mathbb{E}\Bigl[\frac{J^\top}{\sigma_x^2}\Bigr], \quad
# b = -\mathbb{E}\Bigl[\frac{J^\top \mu_x}{\sigma_x^2} + \frac{z - \mu_p}{\sigma_p^2}\Bigr].
# $$ (eq-it-affine)
#
# Given the draws, the gradient is an *affine map of the observation*; the draws make the map random. It is built from two prediction errors, $x - \mu_x$ from below and $z - \mu_p$ from above, each divided by *its own* variance. For the variances,
#
# $$
# \nabla_{\sigma^2} \mathcal{L} = \mathbb{E}\Bigl[\Bigl(J^\top \frac{x - \mu_x}{\sigma_x^2} - \frac{z - \mu_p}{\sigma_p^2}\Bigr) \odot \frac{\varepsilon}{2 \sigma}\Bigr] + \frac{1}{2 \sigma^2},
# $$ (eq-it-variance)
#
# where the last term is the gradient of the entropy $\sum_j \log \sigma_j$ + constant. It is positive: entropy pushes $q$ to be wider.
#
# These formulas are often transcribed with slips. The poster's $b$ has no $\sigma_x^2$ under its first term; transcriptions of its gradient show the two variances as one ratio $\sigma_x^2 / \sigma_p^2$; and an earlier poster has a minus before the entropy term. Automatic differentiation decides. We take a decoder that is a network, with its Jacobian from {py:func}`torch.func.jacrev`, and one draw for each observation.

# %%
torch.manual_seed(seed)
net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 6))
x, mu, noise, s_x = torch.randn(50, 6), torch.randn(50, 2), torch.randn(50, 2), 0.5
log_scale = torch.full((50, 2), -0.7).requires_grad_()
mu.requires_grad_()
z = mu + log_scale.exp() * noise
fit_term = -0.5 * ((x - net(z)) / s_x).square().sum() - 0.5 * z.square().sum()
exact = torch.autograd.grad(fit_term + log_scale.sum(), (mu, log_scale))

# %%
J = torch.func.vmap(torch.func.jacrev(net))(z).detach()  # [50, 6, 2]
z, mean = z.detach(), net(z).detach()
pull = torch.einsum("npd,np->nd", J, x - mean) / s_x**2 - z
scale = log_scale.exp().detach()
half = 1 / (2 * scale**2)
in_variance = exact[1] * half  # d/d sigma^2 = (d/d log sigma) / (2 sigma^2)
b = -torch.einsum("npd,np->nd", J, mean)

# %%
# NBVAL_CHECK_OUTPUT
Ax = torch.einsum("npd,np->nd", J, x) / s_x**2
forms = {
    "mean: A x + b": (Ax + b / s_x**2 - z, exact[0]),
    "mean: b without 1 / variance of x": (Ax + b - z, exact[0]),
    "mean: variances as one ratio": ((Ax * s_x**2 + b) * s_x**2 - z, exact[0]),
    "variance: entropy with a plus": (
        pull * noise / (2 * scale) + half,
        in_variance,
    ),
    "variance: entropy with a minus": (
        pull * noise / (2 * scale) - half,
        in_variance,
    ),
}
for name, (form, truth) in forms.items():
    error = ((form - truth).abs().max() / truth.abs().max()).item()
    shown = "below 1e-5" if error < 1e-5 else f"{error:.2f}"
    print(f"{name:36} largest error {shown}")

# %% [markdown] tags=["slide"]
# Errors are shares of the largest entry of the gradient. The corrected forms agree with automatic differentiation to rounding, and the three slips are no small matter.
#
# ### Data or gradient, which to encode?
#
# From {eq}`eq-it-affine` the source concludes that it is equivalent to encode the data or the gradient at a fixed start. Where the posterior mean is linear in $x$, this is exactly right. With $M = W^\top W / \sigma_x^2 + I$ the bound of a linear decoder has $\nabla_\mu \mathcal{L} = W^\top (x - W \mu) / \sigma_x^2 - \mu = M (\mu^\star - \mu)$, hence
#
# $$
# \mu^\star = \mu + M^{-1} \nabla_\mu \mathcal{L} \quad \text{from any } \mu, \qquad \log \sigma_j^\star = -\tfrac12 \log M_{jj}:
# $$ (eq-it-newton)
#
# a Newton step, itself a linear map of $(\mu, \nabla_\mu \mathcal{L})$, is exact at once. (The matrix is $M$; the Fisher information of the diagonal $q$ would be another one.) What then remains is the mean-field gap, $\tfrac12(\sum_j \log M_{jj} - \log \det M)$. We fit linear one-step encoders by least squares to $\mu^\star$, from $x$, from the gradient at the prior, and from both.

# %%
# NBVAL_CHECK_OUTPUT
M = toy.weight.T @ toy.weight / 0.25 + torch.eye(2)
optimum = toy.posterior(x_toy).mean
at_prior = x_toy @ toy.weight / 0.25  # the gradient at mu = 0
for name, read in {"x": x_toy, "gradient": at_prior}.items():
    read, wanted = read.double(), optimum.double()
    solution = torch.linalg.lstsq(read, wanted).solution
    error = (read @ solution - wanted).abs().max()
    print(f"from {name}: largest error below 1e-5: {bool(error < 1e-5)}")


# %% tags=["slide"]
# NBVAL_CHECK_OUTPUT
def newton(state):
    step = torch.linalg.solve(M, state.gradient[:, :2].T).T
    mean = state.parameters[:, :2] + step
    return torch.cat([mean, (-0.5 * M.diagonal().log()).expand_as(mean)], -1)


noiseless = torch.full((500, 2), -15.0)
narrow = torch.cat([3 * torch.randn(500, 2), noiseless], -1)
trace = refine(toy, newton, x_toy, 1, start=narrow)

elbo, _ = inference.level_elbo(toy, gaussian(trace.parameters[1]), x_toy, 4000)
gap = 0.5 * (M.diagonal().log().sum() - torch.logdet(M))
left = (toy.log_evidence(x_toy) - elbo).mean()
assert abs(left - gap) < 0.02
print(f"left after one Newton step: {left:.2f} nats, mean-field gap {gap:.2f}")

# %% [markdown]
# "Equivalent" ends with linearity. A gradient at a fixed start is $D$ to $2D$ numbers, an image is $P$: for $D < P$ the map $x \mapsto Ax + b$ throws information away. In the linear model it throws away exactly what the posterior does not need, because $W^\top x$ is sufficient. A deep decoder at one fixed $z$ has only *that point's* Jacobian, and nothing says that it suffices.
#
# We ask MNIST. The study `iterative_small` trained two small models with 16 latents, one with a standard and one with an iterative encoder ($T = 5$), and a third with two latents; this chapter loads their weights.


# %%
def load(row):
    """Decoder and encoder of a row of the study, loaded or trained here."""
    stem = data.data_folder() / f"models/iterative_small/{row}-laptop-seed0"
    names = (f"{stem}-{role}.safetensors" for role in ("decoder", "encoder"))
    networks = train(row) if retrain else map(evaluation.load_module, names)
    return [network.requires_grad_(False) for network in networks]


# %%
def options(row):
    runs = studies.load_studies()["iterative_small"]
    return next(run.config for run in runs if run.row == row)


def train(row):
    config = options(row)
    training = recipes.iterative_training(config)
    count, draw = training.examples

    def step(index):
        return training.step(draw(index), index)

    passes = {"epochs": config["epochs"], "batch_size": config["batch_size"]}
    state = training.networks | training.optimizers
    fit(step, torch.arange(count), state, schedule=half_cosine, seed=seed, **passes)
    return training.networks.values()


# %%
standard, standard_encoder = load("standard")
iterative, iterative_encoder = load("iterative")
plane, plane_encoder = load("plane")
digits, grey = data.load_mnist_binary("test"), data.load_mnist("train").images
chosen = torch.randperm(10_000, generator=torch.Generator().manual_seed(2018))
x_test, x_valid = digits.images[chosen[:num_images]], data.binarise(grey[-50:])

# %% [markdown]
# Four encoders are trained for the standard model's decoder, which stays as it is: three that answer once and read the image, the gradient at the prior, or both, and one that reads nothing but gradients and its own estimates, five times. The number of updates is the same for all.


# %%
def bound(model, q, x, seed=1):
    """The bound of each example with 100 draws, the same noise in each call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return inference.level_elbo(model, q, x, 100)[0]


# %%
def fit_encoder(model, inputs, num_iterations, gated):
    torch.manual_seed(seed)
    encoder = IterativeEncoder(16, 784, inputs, gated=gated, num_hidden=128)
    optimizer = Adam(encoder.parameters(), 2e-3)
    for _ in range(num_updates):
        x = data.binarise(grey[torch.randint(59_000, (100,))])
        settings = {"num_iterations": num_iterations}
        inference.iterative_step(x, model, encoder, [optimizer], **settings)
    return inference.posterior(model, encoder, x_test, num_iterations)


# %%
reads = {
    "x, once": (("x",), 1, False),
    "gradient, once": (("log_gradient",), 1, False),
    "x and gradient, once": (("x", "log_gradient"), 1, False),
    "gradient and estimates, five times": (("log_gradient", "estimates"), 5, True),
}

# %% mystnb={"table": {"name": "tab-it-reads", "caption": "Bounds of encoders that read different things, in nats, on random test digits with one decoder, and what each gains over the encoder that reads $x$ once, paired over images. ± is the standard error over images; each encoder is trained once."}}
fitted = {}
for name, choice in reads.items():
    fitted[name] = bound(standard, fit_encoder(standard, *choice), x_test)
rows = [
    [name, mean_and_se(value), paired_difference(value, fitted["x, once"])]
    for name, value in fitted.items()
]
rows[0][2] = None
markdown_table(["encoder reads", "bound", "minus x, once, in pairs"], rows, 1)

# %%
# NBVAL_CHECK_OUTPUT
once = paired_difference(fitted["gradient, once"], fitted["x, once"])
often = fitted["gradient and estimates, five times"]
again = paired_difference(often, fitted["gradient, once"])
print(
    "gradient alone, once, is worse than x by",
    "over" if once.mean < -5 else "under",
    "5 nats",
)
print("and better when it is taken five times:", again.mean > 2 * again.se)

# %% [markdown] tags=["slide"]
# On MNIST the equivalence fails, as the dimension count said it may. One gradient at the prior is a poor substitute for the image, and beside the image it did not help in this run. What a gradient offers is that it can be *taken again*, at the new estimate, where it reports what the image alone cannot: how the decoder responds to this very answer. The published readings agree: with gradients alone the source needs 16 iterations to pass a standard encoder, and 5 with $x$ beside them ({ref}`the table below <sec-it-ablation>`).
#
# (sec-it-levels)=
# ## Levels, and who pulls from above
#
# In a hierarchy $z^2 \to z^1 \to x$ the prior of $z^1$ is $\mathcal{N}(\mu_p(z^2), \sigma_p(z^2)^2)$, an *empirical prior* that differs from image to image. The gradient of a level's mean has two parts:
#
# $$
# \nabla_{\mu^1} \mathcal{L} = \mathbb{E}\Bigl[\underbrace{J_1^\top \frac{x - \mu_x}{\sigma_x^2}}_{\text{bottom-up}} - \underbrace{\frac{z^1 - \mu_p}{\sigma_p^2}}_{\text{top-down}}\Bigr], \qquad
# \nabla_{\mu^2} \mathcal{L} = \mathbb{E}\Bigl[J_2^\top \frac{z^1 - \mu_p}{\sigma_p^2} - z^2\Bigr] + \dots
# $$ (eq-it-levels)
#
# (the dots: the same for $\sigma_p$, where that depends on $z^2$). Both brackets are one, and each error is divided by its own variance, which the poster's version leaves out. The error of level 1 against its prior appears twice: it pulls $z^1$ down to what level 2 expects, and it pushes $z^2$ towards what level 1 has found.
# We compute the two terms separately in a model of two levels, and compare their sum with automatic differentiation.

# %%
torch.manual_seed(seed)
levels = DeepLatentGaussian((6, 3), 40, "real", num_hidden=30).requires_grad_(False)
x_levels, _ = levels.sample(300)
start = torch.cat([torch.randn(300, 9), torch.full((300, 9), -1.0)], -1)
state = look(levels, InferenceState(x_levels, start))

# %%
# NBVAL_CHECK_OUTPUT
z = state.terms.z[0].detach().requires_grad_()
fit_term = levels.likelihood(z).log_prob(x_levels).sum()
(bottom_up,) = torch.autograd.grad(fit_term, z)
prior = conditional_normal(levels.prior(), z.detach())
top_down = -(start[:, :6] - prior.mean[:, :6]) / prior.variance[:, :6]
total = bottom_up[:, :6] + top_down
assert torch.allclose(total, state.gradient[:, :6], rtol=1e-4, atol=1e-3)
size = [part.square().mean().sqrt().item() for part in (bottom_up[:, :6], top_down)]
below = size[0] / sum(size)
print(f"their sum is the gradient; shares by size: {below:.2f}, {1 - below:.2f}")

# %% [markdown]
# (The top-down term is written with $\mu$ in the place of $z^1$, because the divergence given $z^2$ is in closed form.)
#
# What is lost without it? Local optimisation answers for this model: Adam with the whole gradient, and Adam with the top-down term removed from the gradient of level 1. Both are judged by the whole bound.


# %%
def without_top_down(state, step):
    prior = conditional_normal(levels.prior(), state.terms.z)
    pull = (state.parameters[:, :6] - prior.mean[..., :6]) / prior.variance[..., :6]
    gradient = state.gradient.clone()
    gradient[:, :6] += pull.mean(0)
    return step(state._replace(gradient=gradient))


# %%
# NBVAL_CHECK_OUTPUT
steps = {"whole": inference.gradient_ascent(partial(Adam, lr=0.03))}
blind = inference.gradient_ascent(partial(Adam, lr=0.03))
steps["bottom-up only"] = partial(without_top_down, step=blind)
reached = {}
for name, step in steps.items():
    trace = refine(levels, step, x_levels, max(100, num_steps), num_samples=4)
    q = gaussian(trace.parameters[-50:].mean(0))
    reached[name] = bound(levels, q, x_levels)
lost = paired_difference(reached["whole"], reached["bottom-up only"])
assert lost.mean > 4 * lost.se
print(f"the top-down term is worth {lost.mean:.1f} nats an observation here")

# %% [markdown] tags=["slide"]
# So a gradient without the term is a wrong gradient. But mind what this does *not* show. For fixed $\theta$ the best $\lambda$ for an image is some function of that image, and a large enough bottom-up encoder can represent it: it must then learn, in its own weights, what the prior networks know already, and learn it again whenever they change. A *ladder* encoder {cite:p}`sonderby2016ladder` hands it that knowledge: it weighs a bottom-up estimate of $z^1$ by precision against the prior given $z^2$, in one pass and without any gradient.
# It is the control for the claim that *gradients* are what justifies top-down inference. The table {ref}`below <sec-it-results>` has the three side by side.
#
# ## An optimiser that one can watch
#
# With two latents the bound is a surface over the plane of $\mu$, drawn here for one digit at the $\sigma$ that the encoder arrives at. The iterative encoder starts at the prior and at four other places.

# %%
x_one = x_test[3:4]
starts = torch.tensor([[0.0, 0], [-2, 2], [2, 2], [2, -2], [-2, -2]])
starts = torch.cat([starts, torch.zeros(5, 2)], -1)
torch.manual_seed(seed)
settings = {"start": starts, "num_samples": 10}
paths = refine(plane, plane_encoder, x_one.expand(5, -1), 5, **settings)
settled = paths.parameters[-1, 0]
side = torch.linspace(-3, 3, num_grid)
grid = torch.cartesian_prod(side, side)
lam = torch.cat([grid, settled[2:].expand(len(grid), -1)], -1)
copies = x_one.expand(len(grid), -1)
surface = inference.level_elbo(plane, gaussian(lam), copies, 20)[0]
surface = surface.reshape(num_grid, num_grid).T

# %% tags=["hide-input", "slide"] mystnb={"figure": {"name": "fig-it-plane", "caption": "The bound of one test digit over the means of its two latents, at the scales on which the encoder settles (darker: lower; dashed contours 10, 30, 100 and 300 nats below the highest point of the grid). There are two hills, the higher one at the left. Each frame adds one iteration of the learned optimiser, from the prior (circle) and from four other starts (squares)."}, "image": {"alt": "An animation: on a grey relief with two light hills five paths of an iterative encoder start at the centre and near the corners. After one step all are near the summit of the higher hill, and later steps stay there; one start was at the foot of the lower hill."}}
top = surface - surface.max()
inks = (
    {"cmap": "Greys_r", "alpha": 0.6},
    {"colors": plotting.GREY, "linewidths": 0.9},
)


def draw(figure, frame):
    ax = figure.subplots()
    ax.contourf(side, side, top.clamp(min=-400), levels=20, **inks[0])
    ax.contour(side, side, top, levels=[-300, -100, -30, -10], **inks[1])
    for start in range(5):
        path = paths.parameters[: frame + 1, start, :2]
        style = {"color": plotting.COLOURS["samples" if start else "approximation"]}
        ax.plot(*path.T, ".-", ms=6, lw=1.3, **style)
        ax.plot(*path[0], "s" if start else "o", fillstyle="none", ms=8, **style)
    ax.set(title=f"iteration {frame}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    ax.set(xlabel=r"$\mu_1$", ylabel=r"$\mu_2$")


alt = "Five paths of an iterative encoder on the surface of the bound."
plotting.animate(draw, 6, size=(4.2, 4), fps=1.5, num_colours=64, alt=alt)

# %%
# NBVAL_CHECK_OUTPUT
moves = paths.parameters[1:, 0, :2] - paths.parameters[:-1, 0, :2]
lengths = moves.norm(dim=-1)
print("the first step is the longest:", bool(lengths[0] == lengths.max()))
print("the last is under a third of it:", bool(lengths[-1] < lengths[0] / 3))
short = surface.max() - paths.elbo[-1]
print("starts that end within 30 nats of the summit:", int((short < 30).sum()))

# %% [markdown]
# The first step does most of the work, and the later ones are small corrections: that is the source's reading of its own figure, and ours of this one. One start lies beside the lower hill, which gradient ascent would climb; the encoder leaves it in one step. A learned optimiser need not follow the slope: it reads the image, too, and has seen many digits.
#
# The same in pictures: what the 16-latent model decodes from the mean of $q$ after each iteration.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-it-digits", "caption": "Decoded means of the approximate posterior. From left to right: the prior, iterations 1 to 5, iteration 10 (trained: 5), and at the right, in another colour, the binary test digit."}, "image": {"alt": "Five rows of digits: a grey blur at the left, a recognisable digit from the second column on, hardly changing after it, and the observed binary digit at the right."}}
torch.manual_seed(seed)
shown = refine(iterative, iterative_encoder, x_test[:5], 10).parameters[..., :16]
means = iterative.likelihood(shown[[0, 1, 2, 3, 4, 5, 10]]).mean  # [7, 5, 784]
figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 4), width_ratios=(7, 1))
plotting.show_digits(means.transpose(0, 1).reshape(-1, 784), ncols=7, ax=left)
green, orange = (plotting.COLOURS[name] for name in ("exact", "approximation"))
plotting.show_digits(x_test[:5], ncols=1, ax=right, colour=green)
left.set_title("prior, iterations 1, 2, 3, 4, 5 and 10")
right.set_title("digit")
plt.show()

# %% [markdown] tags=["slide"]
# ### The gradient through training
#
# An optimiser that works brings the gradient down. The source follows its size through training, one curve for each iteration, and finds that it decreases. We ask the same of a model that is trained here for its first updates, at the settings of the committed one, which is the last point. Two details matter. A gradient from a few draws has noise, whose size does not go away at the optimum. The product of *two independent* estimates has the squared expected gradient as its mean, and so the curves show the gradient without its noise. And the curve $t = 0$, the gradient at the prior, where no encoder has been yet, is the control: what it does is due to the decoder alone.


# %% tags=["hide-input"]
def expected_sizes(model, encoder, x):
    """Root mean square of the expected gradient in mu, at iterations 0 to 5."""
    found = []
    for lam in refine(model, encoder, x, 5).parameters:
        state = InferenceState(x, lam)
        one, two = (look(model, state, 20).gradient[:, :16] for _ in range(2))
        found.append((one * two).mean().clamp(min=1e-6).sqrt())
    return torch.stack(found)


# %% tags=["hide-input"]
torch.manual_seed(seed)
training = recipes.iterative_training(options("iterative"))
count, draw_batch = training.examples
last, through = num_updates // 3, {}
for update in range(last + 1):
    if update in (0, last // 10, last // 3, last):
        through[update] = expected_sizes(*training.networks.values(), x_test)
    index = torch.randint(count, (100,))
    training.step(draw_batch(index), index)
recorded_updates = options("iterative")["epochs"] * count // 100
final_sizes = expected_sizes(iterative, iterative_encoder, x_test)
through[recorded_updates] = final_sizes

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-it-training", "caption": "Root mean square of the expected gradient in $\\mu$ against the number of updates (linear up to 10, then logarithmic), on test digits: at the prior ($t = 0$, dotted) and after each of five iterations of the encoder. The last points are those of the committed model, the others of a training on this page."}, "image": {"alt": "On a logarithmic axis, the dotted curve of the prior rises from below 1 to nearly 100 within a hundred updates and is at about 30 at the end. The curves of iterations 1 to 5 start from the same value, rise to about 2 within some tens of updates and stay there, close together."}}
figure, ax = plt.subplots(figsize=(5.6, 3.4))
sizes = torch.stack(list(through.values()))
for t in range(6):
    style = {"color": orange, "alpha": 0.25 + 0.15 * t}
    style = style if t else plotting.LINES["reference"]
    ax.plot(list(through), sizes[:, t], marker=".", label=f"t = {t}", **style)
ax.set(xlabel="updates", ylabel="size of the expected gradient in μ", yscale="log")
ax.set_xscale("symlog", linthresh=10)
ax.set_xlim(0, None)
ax.legend(fontsize=8, ncols=2)
plt.show()

# %% tags=["hide-input"]
# NBVAL_CHECK_OUTPUT
for update, size in (("no", through[0]), ("all", final_sizes)):
    shares = [f"{share:.1f}" for share in (size[1:] / size[0]).tolist()]
    print(f"after {update} updates, as shares of t = 0:", *shares)
if num_updates >= 300:
    untrained = through[0]
    assert final_sizes[1] > final_sizes[5] and final_sizes[1] < 0.1 * final_sizes[0]
    assert untrained.max() < final_sizes[5]
    assert sizes[:, 0].max() > 50 * untrained[0]

# %% [markdown]
# In the committed model the gradient decreases within the iterations, as the source finds, and by far the most at the first one. Through *training* its absolute size does not decrease here. A decoder that has just been made hardly uses $z$, so its gradients are small wherever one stands. As it learns, the gradient at the prior grows a hundredfold, and what falls is the share of it that the encoder leaves, from all to less than a tenth. The smallest gradients in the figure belong to models that have learned next to nothing: a small gradient alone is no sign of good inference, and has to be read beside that of a start.

# %% [markdown] tags=["slide"]
# ## A race against hand-made optimisers
#
# How good an optimiser is it? We fix the decoder of the iterative model and start everybody at the prior. The rivals are SGD, SGD with momentum 0.9, RMSProp and Adam, on the same gradients with one draw each. Every rival is tuned: a learning rate is chosen from the printed grid by its mean bound over the last ten of 60 steps on 50 training images that no race uses. An untuned rival would prove nothing.

# %%
rivals = {
    "SGD": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "RMSProp": RMSprop,
    "Adam": Adam,
}
rates = [0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003]


def validated(make, rate):
    torch.manual_seed(seed)
    step = inference.gradient_ascent(partial(make, lr=rate))
    try:
        bounds = refine(iterative, step, x_valid, min(60, num_steps)).elbo
    except FloatingPointError:  # the step was too long
        return -torch.inf
    return bounds[-10:].mean().item()


# %%
# NBVAL_CHECK_OUTPUT
tuned = {n: max(rates, key=partial(validated, make)) for n, make in rivals.items()}
print("grid:", *rates, "| chosen:", tuned)
if num_steps >= 100:  # none at an edge of the grid
    assert all(min(rates) < rate < max(rates) for rate in tuned.values())

# %%
torch.manual_seed(seed)
racers = {n: partial(make, lr=tuned[n]) for n, make in rivals.items()}
racers["Adam, slower"] = partial(Adam, lr=0.02)
curves, final = {}, {}
for name, make in racers.items():
    trace = refine(iterative, inference.gradient_ascent(make), x_test, num_steps)
    curves[name], final[name] = trace.elbo.mean(1), trace.parameters[-1]

# %%
learned = refine(iterative, iterative_encoder, x_test, 20)
curves["iterative encoder"] = learned.elbo.mean(1)
final["iterative encoder"] = learned.parameters[5]
slow = inference.gradient_ascent(racers["Adam, slower"])
trace = refine(iterative, slow, x_test, num_steps, start=learned.parameters[1])
spent = torch.tensor([torch.nan])  # the gradient that the encoder has read
curves["encoder, then Adam, slower"] = torch.cat([spent, trace.elbo.mean(1)])
final["encoder, then Adam, slower"] = trace.parameters[-1]

# %% tags=["hide-input", "slide"] mystnb={"figure": {"name": "fig-it-race", "caption": "Left: mean bound on the test digits against the number of gradients taken, each a pass through the decoder and back, from the prior. One draw for each estimate. The iterative encoder was trained for 5 iterations and runs for 20. Right: root mean square of the gradient in $\\lambda$ along the iterations of the encoder; it is estimated with one draw, whose noise stays when the gradient itself is small."}, "image": {"alt": "Left, seven curves that rise to a plateau near -120 nats: the encoder's at its second gradient, those of SGD, momentum, RMSProp and Adam within tens of gradients, that of the slower Adam only at some hundreds; the curve that starts at the encoder lies on the plateau from its beginning. Right, the size of the gradient falls tenfold at the first iteration and stays flat afterwards."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.8), width_ratios=(2, 1))
styles = {"iterative encoder": {"lw": 2.6, "color": orange}}
styles["Adam, slower"] = {"lw": 1.4, "color": plotting.GREY}
colours = iter(["bound", "exact", "samples", "highlight", "other"])
for name, curve in curves.items():
    style = styles.get(name) or {
        "color": plotting.COLOURS[next(colours)],
        "lw": 1.4,
    }
    left.plot(range(1, len(curve) + 1), curve, label=name, **style)
left.set(xscale="log", xlabel="gradients", ylabel="mean bound, nats")
left.set_ylim(-250, None)
figure.legend(fontsize=8, loc="outside lower center", ncols=3)
norms = learned.gradient.square().mean((1, 2)).sqrt()
right.plot(range(21), norms, ".-", color=orange)
right.set(yscale="log", xlabel="iteration", ylabel="size of the gradient")
plt.show()

# %%
# NBVAL_CHECK_OUTPUT
plateau = learned.elbo[5].mean() - 2.0  # two nats below the fifth iteration
needed = {}
for name, curve in curves.items():
    there = (curve > plateau).nonzero()
    needed[name] = int(there[0]) + 1 if len(there) else None
quickest = min(needed[name] or num_steps for name in racers)
own = needed["iterative encoder"]
print("the encoder is there within 5 gradients:", own <= 5)
print("every rival needs at least five times as many:", quickest >= 5 * own)

# %% tags=["slide"] mystnb={"table": {"name": "tab-it-race", "caption": "The race: chosen learning rate, gradients until the mean bound is within 2 nats of the encoder's fifth iteration, final bound in nats, and how far it is above the encoder's after five iterations, paired over images. ± is the standard error over images."}}
ends = {n: bound(iterative, gaussian(end), x_test) for n, end in final.items()}
reference, rows = ends["iterative encoder"], []
for name, value in ends.items():
    rate = f"{tuned.get(name, 0.02):g}" if name != "iterative encoder" else None
    ahead = None if value is reference else paired_difference(value, reference)
    rows.append([name, rate, needed[name], mean_and_se(value), ahead])
header = ["optimiser", "rate", "gradients to within 2 nats", "final bound"]
markdown_table([*header, "minus encoder, in pairs"], rows, 2)

# %% [markdown]
# Read the table in both directions. Counted in gradients, the encoder wins the sprint by a wide margin: nobody else reads the image, and it was trained on digits. But a hand-made optimiser works for *any* decoder and goes on improving; the last column shows which of them end above the encoder's fifth iteration. A learned optimiser amortises the search, and does not replace its end.
# The rates of the four rivals were chosen for 60 steps, where fast ones win. The slower Adam is there for the last row, semi-amortised inference, which starts at the encoder's first iteration and needs small steps: the difference of these two rows is what the start is worth at equal rates.
#
# Counting gradients is not counting seconds, since the encoder's own network costs time too. How long a gradient takes each optimiser was measured once, on one thread, with the optimisers in turns (`python workflow/race_times.py` measures it on your machine); the times are recorded, so that this page is the same wherever it is run.

# %% tags=["hide-input"] mystnb={"table": {"name": "tab-it-seconds", "caption": "The race in processor time: gradients until the mean bound is within 2 nats of the encoder's fifth iteration, as in the table before; recorded milliseconds of one gradient for 200 digits, with all that the optimiser does about it; and the product, in seconds. A dash: not reached."}}
race_file = data.data_folder() / "measured/iterative_race.json"
recorded_cost = json.loads(race_file.read_text())["milliseconds_a_gradient"]
rows = []
for name in [*rivals, "iterative encoder"]:
    cost, count = recorded_cost[name], needed[name]
    rows.append([name, count, cost, count and count * cost / 1000])
header = ["optimiser", "gradients", "milliseconds a gradient", "seconds"]
markdown_table(header, rows, 2)

# %% tags=["hide-input"]
# NBVAL_CHECK_OUTPUT
dearer = recorded_cost["iterative encoder"] / recorded_cost["Adam"]
print(f"an iteration of the encoder costs {dearer:.1f} steps of Adam")

# %% [markdown]
# So an iteration of the encoder is dearer than a step of a hand-made optimiser, by its own network, but by far less than the factor in gradients: at test time the sprint is won in seconds, too. Training is another matter. These are the recorded seconds of the two models:

# %% mystnb={"table": {"name": "tab-it-cost", "caption": "Recorded time of one training update, in milliseconds on one thread, mean over seeds."}}
small_study = tables.load_study("iterative_small", "laptop")
rows = []
for row, label in {"standard": "standard", "iterative": "iterative, T = 5"}.items():
    facts = [run.record["details"] for run in small_study.get(row, [])]
    cost = [1000 * f["seconds"]["training"] / f["steps"] for f in facts]
    rows.append([label, len(facts), sum(cost) / len(cost) if cost else None])
markdown_table(["model", "seeds", "milliseconds for an update"], rows, 1)

# %% [markdown] tags=["slide"]
# An update with an iterative encoder takes several times as long. A comparison at equal updates favours it, one at equal seconds the standard encoder; the large study has rows for both.
#
# (sec-it-square)=
# ## Better inference, or a better model?
#
# A model trained with better inference can end with a higher bound for two reasons: its *decoder* may be better, or its *posterior* may be closer. A table of bounds or of estimated $\log p_\theta(x)$ mixes the two. They come apart in a square: take the decoder of each training, and give each of them, after the fact, the *same* three inferences: a standard encoder and an iterative one that are newly trained for this decoder with equal updates, and local optimisation by Adam from the row's own encoder, as a stand-in for the best that mean-field can do.


# %%
def square(trainings):
    """Decoder -> inference -> bounds of 300 images for each common seed."""
    by_seed = {
        row: {run.record["seed"]: run.per_image for run in small_study[row]}
        for row in trainings
        if row in small_study
    }
    seeds = sorted(set.intersection(*map(set, by_seed.values())))
    found = {}
    for row, runs in by_seed.items():
        runs, n = [runs[k] for k in seeds], 300
        found[row] = {
            "standard": [v["elbo_posthoc_standard"][:n] for v in runs],
            "iterative": [v["elbo_posthoc_iterative"][:n] for v in runs],
            "optimised": [v["elbo"][:n] + v["svi_gain"] for v in runs],
        }
    return found


# %% mystnb={"table": {"name": "tab-it-square", "caption": "Bounds on 300 test images in nats for each decoder (rows) with each inference fitted to it afterwards (columns): mean over the seeds ± standard error over images, and in parentheses half the width of the 95 % t-interval over seeds."}}
trainings = {"standard": "standard", "iterative": "iterative"}
trainings["standard_long"] = "standard, seconds of iterative"
cells = square(trainings)
rows = [
    [trainings[row], *(tables.pool(v).text() for v in found.values())]
    for row, found in cells.items()  # by inference
]
header = ["decoder trained by \\ inference", "standard", "iterative", "optimised"]
markdown_table(header, rows)

# %% tags=["hide-input", "slide"] mystnb={"figure": {"name": "fig-it-square", "caption": "Decoders by inferences, from the study `iterative_small`: mean bound on 300 test digits. A dot is a training seed, a line joins the means over seeds. Differences along a line are due to inference, differences between the lines to the decoder."}, "image": {"alt": "A line for each training over three inferences, standard, iterative and optimised, with a dot for each seed; every line rises from left to right, most from iterative to optimised. The line of the standard training at equal seconds lies more than ten nats above the other two, whose dots overlap."}}
figure, ax = plt.subplots(figsize=(5.6, 3.2))
styles = {
    "standard": "bound",
    "iterative": "approximation",
    "standard_long": "exact",
}
for row, by in cells.items():
    points = torch.stack([torch.stack(by[n]).mean(1) for n in by])  # [3, seeds]
    colour = plotting.COLOURS[styles[row]]
    ax.plot(range(3), points.mean(1), color=colour, label=trainings[row])
    ax.plot(range(3), points, ".", color=colour, ms=9, alpha=0.7)
ax.set_xticks(range(3), ["standard", "iterative", "optimised"])
ax.set(xlabel="inference, fitted after training", ylabel="mean bound, nats")
ax.legend()
plt.show()


# %%
# NBVAL_CHECK_OUTPUT
def difference(a, b):
    return tables.pool([x - y for x, y in zip(a, b, strict=True)])


for row in ("standard", "standard_long"):
    for name in ("standard", "optimised"):
        found = difference(cells["iterative"][name], cells[row][name])
        print(f"decoder, iterative minus {row}, {name} inference: {found.text()}")
        settled = abs(found.mean) > found.half_width
        assert settled == (row == "standard_long") and (found.mean > 0) != settled
for row, by in cells.items():
    found = difference(by["iterative"], by["standard"])
    assert found.mean > found.half_width
    print(f"inference, iterative minus standard, decoder of {row}: {found.text()}")

# %% [markdown] tags=["slide"]
# Three findings, each asserted. *Inference*: on every decoder the iterative encoder ends above the standard one that was trained beside it with the same number of updates, and the interval over seeds excludes zero. *Decoders at equal updates*: the iterative training is ahead on average, but the interval holds zero: one training differs from the next by as much. *Decoders at equal seconds*: the standard training, which has time for more than three times as many updates, ends with the better decoder, and by far. All three trainings are short, so this is a statement about a budget of some minutes; the larger study asks again with longer ones. Optimisation adds more to each decoder than the choice of encoder does.
#
# ## Beyond the source
#
# ### What remains of the amortisation gap
#
# The *amortisation gap* of an encoder for an image is the bound at the best $\lambda$ minus the bound at the encoder's {cite:p}`cremer2018suboptimality`. It is what further iterations can win. We estimate the best $\lambda$ by Adam with ten draws, started at the encoder and averaged over its last iterations, and ask how much of the gap of the first answer each iteration closes.

# %% mystnb={"table": {"name": "tab-it-gap", "caption": "Amortisation gap in nats: the bound at optimised parameters of $q$ minus the bound at the encoder's, mean ± standard error over images; and the share of the gap at $t = 1$ that later iterations close."}}
torch.manual_seed(seed)


def optimised(model, start, x):
    step = inference.gradient_ascent(partial(Adam, lr=0.02))
    trace = refine(model, step, x, num_steps // 2, start=start, num_samples=4)
    return gaussian(trace.parameters[-num_steps // 4 :].mean(0))


best = bound(iterative, optimised(iterative, learned.parameters[5], x_test), x_test)
rows, gaps = [], {}
for t in (1, 2, 5, 10, 20):
    gaps[t] = best - bound(iterative, gaussian(learned.parameters[t]), x_test)
    closed = 1 - (gaps[t].mean() / gaps[1].mean()).item()
    rows.append([f"iterative, t = {t}", mean_and_se(gaps[t]), closed])
q = inference.posterior(standard, standard_encoder, x_test)
start = torch.cat([q.mean, q.stddev.log()], -1)
local = optimised(standard, start, x_test)
gap = bound(standard, local, x_test) - bound(standard, q, x_test)
rows.append(["standard, own decoder", mean_and_se(gap), None])
markdown_table(["encoder", "gap to the optimum", "share of t = 1 closed"], rows, 2)

# %% tags=["hide-input", "slide"] mystnb={"figure": {"name": "fig-it-gaps", "caption": "Distribution over test digits of the amortisation gap: of the iterative encoder after 1, 2, 5 and 10 iterations, and of the standard encoder with its own decoder. A curve further to the left is better."}, "image": {"alt": "Five cumulative curves over the gap in nats. That of the first iteration lies furthest right among the iterative ones; those of iterations 5 and 10 nearly coincide."}}
figure, ax = plt.subplots(figsize=(5.6, 3.2))
share = torch.arange(1, num_images + 1) / num_images
for t, alpha in {1: 0.35, 2: 0.55, 5: 1.0, 10: 0.8}.items():
    style = {"color": plotting.COLOURS["approximation"], "alpha": alpha}
    ax.plot(
        gaps[t].sort().values,
        share,
        "-" if t < 10 else ":",
        label=f"iterative, {t}",
        **style,
    )
ax.plot(gap.sort().values, share, label="standard", **plotting.LINES["bound"])
ax.set(xlabel="amortisation gap, nats", ylabel="share of digits", xlim=(-1, 12))
ax.legend()
plt.show()

# %%
# NBVAL_CHECK_OUTPUT
for a, b in ((1, 2), (2, 5)):
    gain = paired_difference(gaps[a], gaps[b])
    rises = gain.mean > 2 * gain.se
    print(f"t = {a} to {b} raises the bound, by over 2 standard errors: {rises}")
print(
    "ten iterations, twice as many as trained for, stay within 1 nat of five:",
    bool((gaps[10].mean() - gaps[5].mean()).abs() < 1),
)

# %% [markdown] tags=["slide"]
# ### Refinement tightens the bound; the evidence stays
#
# The evidence $\log p_\theta(x)$ belongs to the decoder. Whoever refines $q$ at test time raises the *bound*, and the importance-weighted estimate as far as its proposal was poor, but no refinement can raise what is estimated. Bounds before and after refinement must not be read as likelihoods of two models.

# %% tags=["slide"] mystnb={"table": {"name": "tab-it-evidence", "caption": "What four more iterations of the encoder add, in nats, to the bound and to the importance-sampling estimate of $\\log p_\\theta(x)$: mean ± standard error of the paired differences over 100 test images."}}
estimates, few = {}, x_test[:100]
sampling = {"num_samples": num_importance, "seed": seed}
for t in (1, 5):
    q = gaussian(learned.parameters[t, : len(few)])
    weigh = partial(evaluation.importance_sampling_ll, iterative, lambda x, q=q: q)
    estimates[t] = bound(iterative, q, few), weigh(few, **sampling).log_likelihood
pairs = zip(estimates[1], estimates[5], strict=True)
change = [paired_difference(after, before) for before, after in pairs]
rows = [["bound", change[0]], ["estimate of log p(x)", change[1]]]
markdown_table(["from iteration 1 to 5", "change, nats"], rows, 2)

# %%
# NBVAL_CHECK_OUTPUT
rises, moves = change[0].mean > 2 * change[0].se, abs(change[1].mean)
print("the bound rises by more than two standard errors:", rises)
print("log p(x) moves by less than half as much:", moves < change[0].mean / 2)

# %% [markdown]
# ### Off the beaten track
#
# Is the encoder an optimiser, or a memory of digits? An optimiser should work on images of another kind and with another decoder, for the gradient says what is wrong with every answer. Three trials, each with local optimisation from the prior as the control that knows no digits: digits of which a tenth of the pixels is flipped, digits turned upside down, and the *other* model's decoder, whose latents mean other things.


# %%
def trial(model, x):
    torch.manual_seed(seed)
    path = refine(model, iterative_encoder, x, 10).parameters
    step = inference.gradient_ascent(partial(Adam, lr=0.05))
    control = refine(model, step, x, num_steps, num_samples=2).parameters
    best = bound(model, gaussian(control[-50:].mean(0)), x)
    return best, {t: bound(model, gaussian(path[t]), x) for t in (1, 5, 10)}


# %% mystnb={"table": {"name": "tab-it-transfer", "caption": "Bound in nats after local optimisation from the prior, and how far above it (negative: below it) the encoder is after 1, 5 and 10 iterations, paired over 100 images. ± is the standard error over images."}}
flipped = (few - torch.bernoulli(torch.full_like(few, 0.1))).abs()
trials = {
    "digits": trial(iterative, few),
    "a tenth of the pixels flipped": trial(iterative, flipped),
    "upside down": trial(iterative, few.flip(-1)),
    "digits, decoder of the other model": trial(standard, few),
}
rows = [
    [name, mean_and_se(best), *(paired_difference(v, best) for v in found.values())]
    for name, (best, found) in trials.items()
]
header = ["observations", "optimised from the prior", "encoder, t = 1", "t = 5"]
display(markdown_table([*header, "t = 10"], rows, 1))

# %%
# NBVAL_CHECK_OUTPUT
for name, (best, found) in trials.items():
    gain, short = paired_difference(found[5], found[1]), (best - found[5]).mean()
    size = "under 5" if short < 5 else "5 to 100" if short < 100 else "over 100"
    print(f"{name}: iterating helps: {gain.mean > 2 * gain.se}; {size} nats short")

# %% [markdown] tags=["slide"]
# The last three columns are differences from the first, in pairs; the printed lines say what iterating does in each trial, and how far the fifth iteration stays below local optimisation. Iterating always helps, and only for inputs near to digits does it help enough. On noise that no digit has, and with a decoder whose coordinates it never saw, the gradient is read by a network that has met no such gradient, and the answer stays far from one that a plain optimiser finds. What was learned is an update rule for digits under one decoder.
#
# ### When can an encoder be exact at all?
#
# With parameters $\theta$ shared and one latent for each observation, the best $\lambda_n$ depends on $x_n$ alone, by the same function for all $n$. An encoder that can represent this function has no amortisation gap, and iterations are a way to represent it, not a way around a limit. {cite:t}`margossian2024amortized` prove that such *simple hierarchical models* are, in essence, the class where an ideal inference function of a single observation exists. In a hidden Markov model, say, the posterior of one latent depends on its neighbours' observations, and no encoder of $x_n$ alone can be exact, however often it is asked.
#
# (sec-it-ablation)=
# ## Ablations: what the encoder reads, how often, how many draws
#
# The published readings are from a figure, to about a tenth of a nat; ours are bounds of a recorded study with 1,200 updates, much shorter than the source's training.

# %% tags=["hide-input", "slide"] mystnb={"table": {"name": "tab-it-ablation", "caption": "Ablation on MNIST: bounds in nats, published (read from a figure) and recorded, mean ± standard error over images, and in parentheses half the width of the 95 % t-interval over seeds. A dash: no such value."}}
labels = {f"standard_k{k}": f"standard, draws: {k}" for k in (1, 5, 10)}
sources = {f"standard_k{k}": f"standard (x) samples={k}" for k in (1, 5, 10)}
kinds = {"gradient_x": "gradient and x", "errors_x": "errors and x"}
kinds |= {"errors": "errors", "gradient": "gradient only"}
for row, kind in kinds.items():
    for t in (2, 5, 10, 16):
        labels[f"{row}_t{t}"] = f"{kind}, T = {t}"
        sources[f"{row}_t{t}"] = f"iterative ({kind}) iterations={t}"
for k in (5, 10):
    labels[f"gradient_x_k{k}"] = f"gradient and x, draws: {k}"
    sources[f"gradient_x_k{k}"] = f"iterative (gradient and x) samples={k}"
labels["normalised_x_t5"] = "normalised gradient and x, T = 5"
labels["blind_t5"] = "x and estimates alone, T = 5"
readings = results.load_published("iterative", metric="ELBO")
known = {entry["row"]: entry["printed"] for entry in readings}
printed = {row: known.get(sources.get(row)) for row in labels}
tables.study_table("iterative_ablation", labels, "elbo", printed, ["laptop"])

# %% [markdown]
# The row "x and estimates alone" is the control that has iterations but no gradient: what it gains over the standard encoder is not due to gradients.
#
# (sec-it-results)=
# ## The claim under test
#
# "Iterative inference models outperform comparable standard inference models across data sets": is it so, at equal samples and equal latents, and at equal seconds? For MNIST the source's code trains the iterative model with ten draws and the standard one with one; the poster's ablation gives ten draws alone about half a nat. The rows below hold both settings. Negative log-likelihoods are published; ours have the other sign.


# %% tags=["hide-input", "slide"] mystnb={"table": {"name": "tab-it-mnist", "caption": "MNIST: importance-sampling estimates of $\\log p(x)$ in nats, published (± as printed there) and recorded at two scales, mean ± standard error over images, and in parentheses half the width of the 95 % t-interval over seeds. A dash: no such value."}}
entries = results.load_published("iterative", metric="NLL")
published = {e["row"]: e["printed"] for e in entries if "2017" not in e["table"]}
one, two = "MNIST single-level", "MNIST hierarchical"
labels = {
    "standard": "one level, standard, 1 draw",
    "standard_10": "one level, standard, 10 draws",
    "standard_long": "one level, standard, seconds of iterative",
    "iterative": "one level, iterative, 1 draw",
    "iterative_10": "one level, iterative, 10 draws",
    "levels_standard": "two levels, standard",
    "levels_ladder": "two levels, ladder",
    "levels_iterative": "two levels, iterative, errors",
    "levels_iterative_gradient": "two levels, iterative, gradient",
}
sources = {"standard": f"{one} standard", "iterative_10": f"{one} iterative"}
sources["levels_standard"] = f"{two} standard"
sources["levels_iterative"] = f"{two} iterative"
printed = {row: f"-{published[name]}" for row, name in sources.items()}
tables.study_table("iterative_mnist", labels, "is_ll", printed)

# %% tags=["hide-input"] mystnb={"table": [{"name": "tab-it-mnist-pairs", "caption": "MNIST at laptop scale: differences of $\\log p(x)$ in nats, paired over images. The middle column is the mean ± standard error over images and, in parentheses, half the width of the 95 % t-interval over seeds; the last column has the mean of each seed."}, {"name": "tab-it-mnist-levels", "caption": "MNIST at laptop scale: divergence from the prior at each of two levels, in nats, mean ± standard error over images, and in parentheses half the width of the 95 % t-interval over seeds. A dash: not recorded."}]}
recorded = tables.load_study("iterative_mnist", "laptop")
pairs = [
    ("iterative", "standard"),
    ("iterative_10", "standard_10"),
    ("iterative_10", "standard"),
    ("iterative", "standard_long"),
    ("levels_iterative", "levels_standard"),
    ("levels_ladder", "levels_standard"),
    ("levels_iterative", "levels_ladder"),
]
display(tables.paired_table(recorded, pairs, "is_ll", labels))
two_levels = {row: labels[row] for row in labels if row.startswith("levels")}
titles = {"KL of level 1": "kl_level_1", "KL of level 2": "kl_level_2"}
tables.metric_table(recorded, two_levels, titles)

# %% [markdown]
# The differences are paired over images, with their interval over seeds. The third one is the published comparison, the second the fair one. In the second table a divergence of level 2 near zero would mean that the model has not used its second level, and then there is nothing for a top-down pass to know.
#
# CIFAR-10 has bits per dimension (less is better), from networks of another size than the source's, with 128 latents in the place of 1024. The bound of the levels' probability by that of dequantised values is in {py:func}`amortised.data.dequantise`.

# %% tags=["hide-input"] mystnb={"table": [{"name": "tab-it-cifar", "caption": "CIFAR-10: bits per dimension, less is better, published (± as printed there) and recorded at two scales, mean ± standard error over images, and in parentheses half the width of the 95 % t-interval over seeds. A dash: no such value."}, {"name": "tab-it-cifar-pairs", "caption": "CIFAR-10 at laptop scale: differences in bits per dimension, paired over images; negative favours the first. The middle column is the mean ± standard error over images and, in parentheses, half the width of the 95 % t-interval over seeds; the last column has the mean of each seed."}]}
one, two = "CIFAR-10 single-level", "CIFAR-10 hierarchical"
labels = {"standard": "one level, standard", "iterative": "one level, iterative"}
labels |= {"levels_standard": "two levels, standard"}
labels |= {"levels_ladder": "two levels, ladder"}
labels |= {"levels_iterative": "two levels, iterative"}
sources = {"standard": f"{one} standard", "iterative": f"{one} iterative"}
sources |= {
    "levels_standard": f"{two} standard",
    "levels_iterative": f"{two} iterative",
}
printed = {row: published[name] for row, name in sources.items()}
study = ("iterative_cifar10", labels, "bits_per_dim", printed)
display(tables.study_table(*study, decimals=3))
recorded = tables.load_study("iterative_cifar10", "laptop")
pairs = [("iterative", "standard"), ("levels_iterative", "levels_standard")]
pairs += [("levels_ladder", "levels_standard")]
tables.paired_table(recorded, pairs, "bits_per_dim", labels, 3)

# %% [markdown]
# For text the source has RCV1, whose token files are public but large; `python -m amortised.data fetch rcv1` gets them, and the study `iterative_rcv1` has its rows (published perplexities: 323 ± 3 standard, with 512 latents, and 285.0 ± 0.1 iterative, with 256). Nothing here stands in for it. The table below is of another corpus, 20 Newsgroups, and has no published column. Entries are nats per word; the perplexity is their exponential.

# %% tags=["hide-input"] mystnb={"table": [{"name": "tab-it-text", "caption": "20 Newsgroups: nats per word, less is better, mean ± standard error over documents, and in parentheses half the width of the 95 % t-interval over seeds. A dash: not recorded."}, {"name": "tab-it-text-pairs", "caption": "20 Newsgroups: differences in nats per word, paired over documents; negative favours the first. The middle column is the mean ± standard error over documents and, in parentheses, half the width of the 95 % t-interval over seeds; the last column has the mean of each seed."}]}
text = {
    "standard": "standard, 50 latents",
    "standard_double": "standard, 100 latents",
    "iterative": "iterative, 50 latents",
}
study = ("iterative_text", text, "nats_per_word", None, ["laptop"])
display(tables.study_table(*study, decimals=3))
recorded = tables.load_study("iterative_text", "laptop")
pairs = [("iterative", "standard"), ("iterative", "standard_double")]
display(tables.paired_table(recorded, pairs, "nats_per_word", text, 3))
for row, label in text.items():
    for run in recorded.get(row, []):
        perplexity = run.per_image["nats_per_word"].double().mean().exp()
        print(f"{label}, seed {run.record['seed']}: perplexity {perplexity:.0f}")

# %% [markdown] tags=["slide"]
# ## Summary
#
# - Local, standard, iterative and semi-amortised inference are one loop with four steps, and $T$ learned iterations cost $T + 1$ passes through the decoder.
# - Given the draws, the gradient of the bound is an affine map of the observation, with each error divided by its own variance and the entropy's term positive. Data and gradient are equivalent to encode in a linear model, and were not on MNIST.
# - In a hierarchy the gradient of a level has a term from below and one from above. Dropping the second costs nats; a ladder encoder is the control that has it without gradients.
# - The learned optimiser is fast in gradients and slower in seconds, its first step does most of the work, and tuned optimisers go further in the end.
# - Decoders crossed with inferences tell a better posterior from a better model. In our short trainings the iterative encoder was the better inference by a small and settled margin; at equal seconds the standard training had by far the better decoder. Refinement tightens the bound and leaves the evidence where it is.
#
# ## Exercises
#
# Each statement says what it asks you to do, how many points its code and its text are worth, and about how long it takes. It ends with a check. Write your answer into a cell of its own, then run the check under it: it prints a tick, or says what is wrong and gives a hint.
#
# ```{exercise} The optimal scale
# :label: ex-it-scale
#
# *Derive · 2 + 2 points · 15 minutes.*
#
# For a linear decoder, differentiate the bound in $\log \sigma_j$ and solve for the maximum. Write `best_log_scale(weight, noise_scale)`, which returns the $D$ optimal log-scales of a mean-field $q$.
#
# ~~~python
# hint = "the expected squared error grows with sigma_j^2 times column j of W squared"
# answer = best_log_scale(toy.weight, 0.5)
# checks.close(answer, -0.5 * M.diagonal().log(), label="the log-scales", hint=hint)
# ~~~
# ```

# %% [markdown] nbgrader={"grade": true, "solution": true, "points": 2}
# ```{solution-start} ex-it-scale
# :label: sol-it-scale
# :class: dropdown
# ```
#
# $\mathbb{E}_q \lVert x - W z \rVert^2$ depends on $\sigma_j$ through $\sigma_j^2 \lVert w_j \rVert^2$, so $\partial \mathcal{L} / \partial \log \sigma_j = 1 - \sigma_j^2 (\lVert w_j \rVert^2 / \sigma_x^2 + 1) = 1 - \sigma_j^2 M_{jj}$. The posterior's *marginal* variance is $(M^{-1})_{jj} \ge 1 / M_{jj}$: the mean-field optimum is too narrow.


# %% nbgrader={"solution": true, "points": 2}
def best_log_scale(weight, noise_scale):
    return -0.5 * (weight.square().sum(0) / noise_scale**2 + 1).log()


# %%
# NBVAL_CHECK_OUTPUT
optimal = best_log_scale(toy.weight, 0.5).exp()
marginal = M.inverse().diagonal().sqrt()
print("narrower than the posterior's margins:", (optimal < marginal).tolist())

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} An encoder that cannot forget
# :label: ex-it-gate
#
# *Build · 2 + 2 points · 15 minutes.*
#
# Write a step `halfway(state)` with the gate fixed at $g = 1/2$ and the Newton answer `newton(state)` as $f$. How does the distance of $\mu$ to the optimum shrink with the iterations, and why is a *learned* gate wiser?
#
# ~~~python
# path = refine(toy, halfway, x_toy, 3, start=narrow).parameters[..., :2]
# ratio = (path[3] - optimum).norm() / (path[0] - optimum).norm()
# hint = "half of the way each time"
# checks.close(ratio, 1 / 8, rtol=0.02, label="the shrinking", hint=hint)
# ~~~
# ```

# %% [markdown] nbgrader={"grade": true, "solution": true, "points": 2}
# ```{solution-start} ex-it-gate
# :label: sol-it-gate
# :class: dropdown
# ```
#
# The Newton answer is the optimum from anywhere, so each step halves the distance. A learned gate can be near 0 at first, where everything is wrong, and near 1 later, where only noise is left to be averaged: it is a learning-rate schedule for each coordinate.


# %% nbgrader={"solution": true, "points": 2}
def halfway(state):
    return 0.5 * state.parameters + 0.5 * newton(state)


# %%
# NBVAL_CHECK_OUTPUT
path = refine(toy, halfway, x_toy, 3, start=narrow).parameters[..., :2]
ratio = (path[3] - optimum).norm() / (path[0] - optimum).norm()
print(f"left of the distance after three steps: {ratio:.3f}")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} The batch in the gradient
# :label: ex-it-batch
#
# *Diagnose · 2 + 2 points · 15 minutes.*
#
# A colleague feeds the gradient of the batch *mean* of the bound, as in the source's code, to an encoder that reads $\log(|g| + 10^{-5})$. Write `seen(gradient, batch_size)`, the logarithms that this encoder sees for per-example gradients `gradient`. For which sizes of $g$ does it see nothing but the floor when it is trained with batches of 64 and used with batches of 10,000?
#
# ~~~python
# g = torch.tensor([1e-3, -1.0, 100.0])
# hint = "in one example's parameters a mean over B has a factor 1 / B"
# expected = ((g / 64).abs() + 1e-5).log()
# checks.close(seen(g, 64), expected, label="what the encoder sees", hint=hint)
# ~~~
# ```

# %% [markdown] nbgrader={"grade": true, "solution": true, "points": 2}
# ```{solution-start} ex-it-batch
# :label: sol-it-batch
# :class: dropdown
# ```
#
# With batches of 10,000 the factor is $10^{-4}$: everything below $|g| = 0.1$ is under the floor, and all other inputs are shifted by $\log(64 / 10^4) \approx -5$ against training. An encoder fed per-example gradients does not know the size of its batch.


# %% nbgrader={"solution": true, "points": 2}
def seen(gradient, batch_size):
    return ((gradient / batch_size).abs() + 1e-5).log()


# %%
# NBVAL_CHECK_OUTPUT
g = torch.tensor([0.001, 0.1, 10.0])
for batch_size in (64, 10_000):
    print(batch_size, [round(v, 1) for v in seen(g, batch_size).tolist()])

# %% [markdown]
# ```{solution-end}
# ```
#
# ## References
#
# ```{bibliography}
# :filter: docname in docnames
# ```
