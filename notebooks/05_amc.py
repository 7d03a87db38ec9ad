# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Amortised MCMC with adversarial distillation
#
# *Under a minute on two cores. You need the bound of {doc}`/chapters/01_vi_recap`, and the estimators of {doc}`/chapters/06_evaluation_hais` for the tables.*
#
# An encoder answers at once and is a little wrong. A Markov chain is right in the end and takes its time.
# Let the encoder propose, let the chain improve the proposal by a few steps, and let the encoder *imitate the improvement*. Next time it will propose better.
# That is amortised MCMC, AMC for short {cite:p}`li2017amc`: a student, a teacher who starts where the student stands, and a lesson.
# The lesson needs no density. So the student may be any network that turns noise into latents.
#
# ```{admonition} What you will be able to do
# :class: tip
# - Write the three steps of AMC, and say which part each baseline leaves out.
# - Predict from one formula when an unadjusted Langevin teacher is biased, and when it explodes.
# - Choose a rule of distillation, knowing which one loses modes and whose fault it is.
# - Read a table of log-likelihoods row by row as recipes, and say what its columns can and cannot tell.
# - Fill in missing pixels, and judge the result against the model's own conditional.
# ```

# %% tags=["parameters"]
seed: int = 0  # of every random number in this chapter
num_rounds: int = 5  # rounds of the first animation
num_students: int = 6  # students that each rule trains side by side
num_steps: int = 150  # distillation steps of each student
num_draws: int = 4000  # draws of each student that are compared with the posterior
train_steps: int = 80  # training steps of the two image models that are trained here
num_images: int = 8  # test images on which those two are evaluated
num_temperatures: int = 50  # temperatures of that evaluation
num_turns: int = 40  # turns of each imputation chain
retrain: bool = False  # train the decoders of Table 1 again, one pass each: over an hour

# %%
from amortised import checks

count = checks.integer(minimum=1)
checks.parameters(
    globals(), seed=checks.integer(minimum=0), num_rounds=checks.integer(minimum=2),
    num_students=count, num_steps=count, num_draws=checks.integer(minimum=100), train_steps=count,
    num_images=checks.integer(minimum=2, maximum=10_000), num_temperatures=count,
    num_turns=count, retrain=checks.boolean(),
)  # fmt: skip

# %%
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from torch import nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal

from amortised import (
    adversarial,
    amc,
    data,
    evaluation,
    experiments,
    imputation,
    mcmc,
    plotting,
    recipes,
    results,
    tables,
)
from amortised.ais import AISSettings, sigmoid_schedule
from amortised.encoders import BlockPerceptrons, GaussianEncoder, ImplicitEncoder, MixtureEncoder
from amortised.models import LatentVariableModel, LinearGaussian
from amortised.numerics import CallCounter
from amortised.results import load_published, markdown_table, paired_difference
from amortised.training import cosine_decay

plotting.use_style()
torch.manual_seed(seed)
Adam = partial(torch.optim.Adam, fused=True)

# %% [markdown]
# ## Student, teacher, lesson
#
# The student draws $z_0 \sim q_\phi(z \mid x)$. A chain that targets the posterior takes $T$ steps from there. Its end is a draw of the *teacher*,
#
# $$
# q_T(z \mid x) = \int \mathcal{K}_x^T(z \mid z_0)\, q_\phi(z_0 \mid x)\, dz_0 .
# $$ (eq-amc-teacher)
#
# One training step then does three things:
#
# $$
# \begin{aligned}
# \text{improve:}\quad & z_T \sim \mathcal{K}_x^T(\cdot \mid z_0), \qquad z_0 \sim q_\phi(\cdot \mid x), \\
# \text{learn:}\quad & \theta \leftarrow \theta + \alpha\, \nabla_\theta \log p_\theta(x, z_T), \\
# \text{distil:}\quad & \phi \leftarrow \phi - \beta\, \nabla_\phi\, \mathrm{d}\bigl(q_T(\cdot \mid x),\, q_\phi(\cdot \mid x)\bigr), \quad q_T \text{ held fixed}.
# \end{aligned}
# $$ (eq-amc-loop)
#
# The middle line is Fisher's identity of chapter 1 with $q_T$ in the posterior's place. The distance $\mathrm{d}$ is still open; most of this chapter is about it.
# After training the teacher is dismissed: at test time one forward pass gives a posterior sample.
#
# Why should this work? Langevin dynamics is itself a descent. With $\pi = p_\theta(z \mid x)$ and time $t = sk$ after $k$ small steps of size $s$, its law satisfies
#
# $$
# \frac{d}{dt} \operatorname{KL}(q_t \,\|\, \pi) = -\tfrac12\, \mathbb{E}_{q_t} \Bigl\lVert \nabla_z \log \frac{q_t(z)}{\pi(z)} \Bigr\rVert^2 \le 0,
# $$ (eq-amc-flow)
#
# and it is the steepest descent of that divergence among all laws, in the geometry of optimal transport {cite:p}`jordan1998jko`. But $q_T$ is no longer a law that the student can represent.
# The lesson brings it back to the family. A step downhill, then a projection: *projected gradient descent*.
#
# To watch it we need a posterior that can be seen whole. Here two latents are folded: $z_1$ and $-z_1$ explain the same $x_1$, so the posterior has two valleys. On a grid it is exact.


# %%
class Fold(LatentVariableModel):
    """x = (|z1| with a rounded tip, z2 + z1 / 2) + noise of scale 0.3."""

    round_prior = Independent(Normal(torch.zeros(2), 1.0), 1, validate_args=False)

    def prior(self):
        return self.round_prior

    def likelihood(self, z):
        z1, z2 = z.unbind(-1)
        mean = torch.stack([nn.functional.softplus(4 * z1) / 2 - z1, z2 + z1 / 2], dim=-1)
        return Independent(Normal(mean, 0.3, validate_args=False), 1, validate_args=False)


fold, square = Fold(latent_dim=2, observation_dim=2), (-4.0, 4.0, -4.0, 4.0)
x_fold = torch.tensor([[0.3, 0.0], [1.0, 0.0], [1.5, 0.7]])  # one mode, a low pass, a high pass
axis = (torch.arange(200) + 0.5) / 25 - 4
grid = torch.cartesian_prod(axis, axis)[:, None]
log_joint = fold.log_joint(x_fold, grid).double()
log_evidence = torch.logsumexp(log_joint, 0) - 2 * math.log(25)
cells = (log_joint.softmax(0).reshape(40, 5, 40, 5, 3)).sum((1, 3))  # mass in 40 x 40 cells


def total_variation(z):
    """Distance of the draws ``[K, 3]`` from the three posteriors, in the 40 x 40 cells."""
    i, j = ((z + 4) * 5).long().clamp(0, 39).unbind(-1)
    shares = [torch.bincount(k, minlength=1600) / len(z) for k in (40 * i + j).unbind(1)]
    return 0.5 * (torch.stack(shares, -1).reshape(40, 40, 3) - cells).abs().sum((0, 1))


# %% [markdown]
# For the cartoon the student is one Gaussian $q$ and the lesson is exact. The Gaussian nearest to the teacher in $\operatorname{KL}(q_T \,\|\, q)$ has the teacher's mean and covariance, so to project is to take moments.

# %%
x, q, frames = x_fold[2:], MultivariateNormal(torch.tensor([0.0, -1.0]), 0.16 * torch.eye(2)), []
log_posterior = (log_joint[:, 2] - log_evidence[2]).float()
for _ in range(num_rounds):
    divergence = (log_posterior.exp() * (log_posterior - q.log_prob(grid[:, 0]))).sum() / 25**2
    z0 = q.sample((num_draws, 1))
    chain = amc.teacher_chain(fold, x, z0, num_steps=8, step_size=0.05).samples
    frames += [(q, divergence.item(), z[:, 0]) for z in (z0, *chain[3::4])]
    q = MultivariateNormal(chain[-1, :, 0].mean(0), torch.cov(chain[-1, :, 0].T))
assert frames[-1][1] < 0.2 * frames[0][1]


# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-amc-projected", "caption": "Projected gradient descent. The posterior (green) has two valleys. The student $q$ (orange) proposes; its draws (pink) flow towards the posterior for eight Langevin steps; then $q$ takes their mean and covariance, and the next round begins. Bar: the exact $\\operatorname{KL}(p \\,\\|\\, q)$."}, "image": {"alt": "Animation: a small orange circle between two green valleys. Pink points spread from it into both valleys; the circle jumps to a long tilted ellipse around them, and changes little after that. A bar on the right falls."}}
def draw(figure, frame):
    q, divergence, draws = frames[frame]
    plane, bar = figure.subplots(1, 2, width_ratios=(5, 1))
    view = {"extent": window, "ax": plane, "num_points": 61}
    plotting.show_density(lambda z: fold.log_joint(x, z.float()), **view)
    ellipse = {"colour": orange, "masses": (0.9,), "fill": False}
    plotting.show_density(lambda z: q.log_prob(z.float()), **view, **ellipse)
    plane.plot(*draws[:250].T, ".", color=plotting.COLOURS["samples"], ms=3)
    plane.set(xlim=window[:2], ylim=window[2:], xlabel="$z_1$", ylabel="$z_2$")
    plane.set_title(f"round {frame // 3 + 1}: {4 * (frame % 3) or 'no'} steps")
    bar.bar([0], [divergence], color=plotting.COLOURS["bound"], alpha=0.5)
    bar.set(ylim=(0, 13), xticks=[], ylabel="nats")


window, orange = (-3, 3.4, -2.4, 3), plotting.COLOURS["approximation"]
plotting.animate(
    draw, len(frames), size=(4.6, 3.4), fps=2, dpi=100, num_colours=64,
    alt="Draws flow into two valleys and an ellipse follows them.",
)  # fmt: skip

# %% [markdown]
# The fixed point is $q = q_T$ up to the projection. Three warnings are visible already. The Gaussian covers both valleys and the empty ridge between them: that is the family's fault.
# The share of points in each valley is whatever the start made it: eight steps do not cross the ridge, so nothing corrects it.
# And if the teacher is biased, the student learns the bias.
#
# (sec-amc-bias)=
# ## How wrong is a chain without a test?
#
# The source uses Langevin steps of size $\eta$ and no Metropolis test: in this book's convention
#
# $$
# z' = z + \tfrac{\eta}{2}\, \nabla_z \log p_\theta(x, z) + \sqrt{\eta}\; \xi, \qquad \xi \sim \mathcal{N}(0, I).
# $$ (eq-amc-langevin)
#
# Take a Gaussian direction of the posterior with precision $\lambda$. The step is an autoregression, $z' = a z + \sqrt{\eta}\, \xi$ with $a = 1 - \eta \lambda / 2$.
# It forgets its start if and only if $|a| < 1$. Its stationary variance solves $v = a^2 v + \eta$, and $1 - a^2 = \eta \lambda (1 - \eta \lambda / 4)$:
#
# $$
# \text{stable} \iff \lambda < \frac{4}{\eta}, \qquad
# v = \frac{1}{\lambda} \cdot \frac{1}{1 - \eta \lambda / 4}.
# $$ (eq-amc-ula)
#
# At half the limit the variance is already doubled. And $v \ge \eta$ always, since the last step alone adds noise of that variance: $z_T$ is never sharper than $\sqrt\eta$. The published table has two settings, $\eta = 0.2$ with $T = 5$ and $\eta = 0.02$ with $T = 50$. The total time $\eta T = 1$ is the same; the limit is not.

# %%
# NBVAL_CHECK_OUTPUT
factors = (0.05, 0.25, 0.5, 0.8)  # precision, in units of the limit
inflation = {}
for eta, steps in ((0.2, 5), (0.02, 50)):
    precisions = 4 / eta * torch.tensor(factors)
    z = torch.randn(20_000, 4) / precisions.sqrt()
    target = Independent(Normal(torch.zeros(4), precisions.rsqrt()), 1)
    kernel = partial(mcmc.langevin_step, logdensity_fn=target.log_prob, step_size=eta)
    z = mcmc.sample_chain(kernel, z, 1, thin=60).samples[-1]
    inflation[eta] = precisions, z.var(0) * precisions
    expected = 1 / (1 - torch.tensor(factors))
    assert ((inflation[eta][1] / expected - 1).abs() < 5 * math.sqrt(2 / 20_000)).all()
    print(f"eta = {eta}: stable for posterior sd > {math.sqrt(eta / 4):.3f};", end=" ")
    print(f"z_T has sd >= {math.sqrt(eta):.2f}; of the start {(1 - eta / 2) ** steps:.2f} is left")
published = load_published("amc", table="Table 1", metric="HAIS-LL")
too_narrow = Independent(Normal(torch.zeros(1), math.sqrt(0.2 / 4 / 1.2)), 1)  # past the limit
kernel = partial(mcmc.langevin_step, logdensity_fn=too_narrow.log_prob, step_size=0.2)
far = mcmc.sample_chain(kernel, torch.zeros(100, 1), 1, thin=60).samples.abs().mean()
print("20 % beyond the limit, after 60 steps: |z| over a million", bool(far > 1e6))
groups = [[r["value"] for r in published if r["row"].endswith(f"={eta}")] for eta in inflation]
print(
    f"published, eta = 0.2: {len(groups[0])} rows within {max(groups[0]) - min(groups[0]):.1f} nats"
)
print(
    f"published, eta = 0.02: {len(groups[1])} rows above by {min(groups[1]) - max(groups[0]):.1f}"
)

# %% [markdown]
# The last number matters too. In a latent direction that the image does not determine, $\lambda = 1$, a share $a^T \approx e^{-\eta T \lambda / 2} \approx 0.6$ of the start survives in both settings.
# There the student, or a stored chain, supplies the answer, not the teacher.


# %% tags=["hide-input"]
def show_inflation(ax):
    for eta, style in zip(inflation, "os", strict=True):
        precisions, ratio = inflation[eta]
        grid = torch.logspace(-0.5, math.log10(3.9 / eta), 100)
        [line] = ax.plot(grid, 1 / (1 - eta * grid / 4), label=rf"$\eta = {eta:g}$")
        ax.plot(precisions, ratio, style, color=line.get_color(), ms=5)
        ax.axvline(4 / eta, linestyle=":", color=line.get_color())
    ax.set(xscale="log", ylim=(0.8, 8), xlabel=r"precision $\lambda$")
    ax.set_ylabel("variance / exact variance")
    ax.legend(loc="upper left")


# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-amc-bias", "caption": "Left: variance of an unadjusted Langevin chain over that of its target, from {eq}`eq-amc-ula` (lines) and simulated (points), with the limits of stability (dotted). Right: the published log-likelihoods in nats, {cite:t}`li2017amc`, Table 1."}, "image": {"alt": "Left, two curves that rise to infinity at precision 20 and 200. Right, ten dots: four rows with step 0.2 lie close together near minus 89.5, most others far to the right of them."}}
shown = {"η = 0.2": {}, "η = 0.02": {}, "no chain": {}}
for row in sorted(published, key=lambda row: row["value"]):
    name, value = row["row"], row["value"]
    kinds = (kind for kind in shown if name.endswith(kind.replace("η = ", "=")))
    shown[next(kinds, "no chain")][name.split(" T=")[0].replace(" |", ",")] = value
names = list(dict.fromkeys(name for group in shown.values() for name in group))
figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.4))
show_inflation(left)
for i, (title, group) in enumerate(shown.items()):
    values = [group.get(name, math.nan) for name in names]
    heights = [row + 0.16 * (i - 1) for row in range(len(names))]
    right.plot(values, heights, "osD"[i], fillstyle="none", ms=5, label=title)
right.set_yticks(range(len(names)), labels=names)
right.set(xlabel="nats", ylim=(len(names) - 0.5, -0.5))
right.grid(axis="x")
right.tick_params(left=False)
right.spines["left"].set_visible(False)
right.legend(fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
# Four rows with $\eta = 0.2$ agree, although two have a Gaussian encoder and two an implicit one, and although one of them, MCMC-VI, does not distil at all. So it is not the encoder.
# Formula {eq}`eq-amc-ula` offers a reason. The decoder learns from $z_T$, and no coordinate of $z_T$ is sharper than $\sqrt{0.2} \approx 0.45$. A decoder that needs finer codes is punished until it gives them up.
# With $\eta = 0.02$ it may use 0.14. This explains the groups; it does not prove the cause. What a Metropolis test would change can be seen on the fold, whose posteriors have directions of precision up to 19, just inside the limit of 20.

# %%
start = torch.stack(
    [grid[torch.multinomial(w, num_draws, True), 0] for w in log_joint.softmax(0).T.float()], 1
)
start += (torch.rand_like(start) - 0.5) / 25  # exact draws, [K, 3, 2]
kernels = {
    "unadjusted, η = 0.2": partial(mcmc.langevin_step, step_size=0.2),
    "unadjusted, η = 0.02": partial(mcmc.langevin_step, step_size=0.02),
    "with a Metropolis test, η = 0.2": partial(mcmc.mala_step, step_size=0.2),
    "Hamiltonian, ε = 0.25, L = 5": partial(mcmc.hmc_step, step_size=0.25, num_steps=5),
}
after = {"exact draws": total_variation(start)}
for name, kernel in kernels.items():
    kernel = partial(kernel, logdensity_fn=partial(fold.log_joint, x_fold))
    after[name] = total_variation(mcmc.sample_chain(kernel, start, 1, thin=60).samples[-1])
biased, exact = after["unadjusted, η = 0.2"], after["with a Metropolis test, η = 0.2"]
assert num_draws < 1000 or (biased > 3 * exact).all()
header = ["60 steps from exact draws", "one mode", "low pass", "high pass"]
markdown_table(header, [(name, *v.tolist()) for name, v in after.items()])

# %% [markdown]
# The table shows total variation; its first row is what counting alone leaves. The chains *started at the posterior*. Unadjusted steps of 0.2 drive them away from it.
#
# (sec-amc-rules)=
# ## Distilling without a density
#
# Now the lesson. If $q_\phi$ has a density, the obvious distance is the inclusive divergence, and its gradient needs draws of the teacher only:
#
# $$
# \operatorname{KL}(q_T \,\|\, q_\phi) = -\mathbb{E}_{q_T}\bigl[\log q_\phi(z \mid x)\bigr] + \text{const}.
# $$ (eq-amc-inclusive)
#
# The source wants implicit students, $z = f_\phi(x, \varepsilon)$. There are draws on both sides and no density on either. That is the setting of adversarial training {cite:p}`goodfellow2014gan`. A discriminator learns to tell them apart,
#
# $$
# \min_\psi\; \mathbb{E}_{q_T}\bigl[\operatorname{softplus}(-D_\psi(x, z))\bigr] + \mathbb{E}_{q_\phi}\bigl[\operatorname{softplus}(D_\psi(x, z))\bigr],
# \qquad D^* = \log \frac{q_T(z \mid x)}{q_\phi(z \mid x)},
# $$ (eq-amc-gan)
#
# and the student moves its draws to where the discriminator sees the teacher, $\min_\phi \mathbb{E}_{q_\phi}[\operatorname{softplus}(-D_\psi(x, z))]$.
# $D$ *must see* $x$: without it the two could agree on average over images and on no single one. The relatives keep that condition.
# The Wasserstein game replaces the logistic loss by a difference of means, with a penalty on slopes in $z$ at fixed $x$ {cite:p}`arjovsky2017wgan,gulrajani2017wgangp`.
# The maximum mean discrepancy (MMD) needs no opponent, but several draws per image {cite:p}`gretton2012mmd`.
#
# In code the rule is an argument of {py:func}`amortised.amc.amc_step`, and so are the student and the teacher with its kernel. Games differ from seed to seed, so each rule trains several students side by side.


# %%
def student(kind):
    """Networks side by side: ``num_students`` of them, each with a copy of the data."""
    encoder, sizes = {
        "gaussian": (GaussianEncoder(2, nn.Identity(), 2), (2, 32, 4)),
        "mixture": (MixtureEncoder(2, 3, nn.Identity(), 2), (2, 32, 15)),
        "implicit": (ImplicitEncoder(2, "gaussian", nn.Identity(), 2), (4, 48, 48, 2)),
    }[kind]
    encoder.head = BlockPerceptrons(num_students, *sizes)
    return encoder


def distil(kind, step=amc.amc_step, **settings):
    """Draws ``[K, num_students, 3, 2]`` after distillation, and the networks."""
    networks, x = {"encoder": student(kind)}, x_fold.repeat(num_students, 1)
    if step is amc.avb_step or settings["rule"].is_game:
        networks["discriminator"] = adversarial.Discriminator(2, nn.Identity(), 2)
        networks["discriminator"].head = BlockPerceptrons(num_students, 4, 48, 48, 1)
        settings["discriminator"] = networks["discriminator"]
    betas = (0.5 if "discriminator" in settings else 0.9, 0.999)
    rates = {"encoder": 2e-3 if kind == "implicit" else 1e-2, "discriminator": 1e-2}
    optimizers = {n: Adam(m.parameters(), rates[n], betas) for n, m in networks.items()}
    decays = [cosine_decay(optimizer, num_steps) for optimizer in optimizers.values()]
    for _ in range(num_steps):
        step(x, fold, networks["encoder"], optimizers, num_samples=16, **settings)
        for decay in decays:
            decay.step()
    with torch.no_grad():
        z = amc.student_samples(networks["encoder"], x, num_draws)
    return z.unflatten(1, (num_students, 3)), networks


# %% [markdown]
# Two teachers: a chain of $T = 5$ steps, and, as a control that only a toy can offer, exact draws of the posterior.
# The control separates two suspects. If a student loses a mode under the exact teacher, the rule did it. If only under the chain, the chain did.


# %%
def exact_teacher(x, z0):
    return start[torch.randint(len(start), (len(z0),))].repeat(1, num_students, 1)


def whole_path(x, z0):
    return amc.teacher_chain(fold, x, z0, num_steps=5, step_size=0.05).samples.flatten(0, 1)


run = partial(amc.teacher_samples, fold)
teachers = {
    "chain": partial(run, num_steps=5, step_size=0.05),
    "exact": exact_teacher,
    "path": whole_path,
    "MALA": partial(run, num_steps=5, step_size=0.1, kernel=mcmc.mala_step),
    "HMC": partial(run, num_steps=1, step_size=0.25, kernel=partial(mcmc.hmc_step, num_steps=5)),
}
rules = {
    "GAN": {"kind": "implicit", "rule": amc.gan(num_critic_steps=2)},
    "Wasserstein": {"kind": "implicit",
                    "rule": amc.wasserstein(2, penalty_weight=0.1)},
    "MMD": {"kind": "implicit", "rule": amc.RULES["mmd"]},
    "KL, Gaussian": {"kind": "gaussian", "rule": amc.RULES["inclusive_kl"]},
    "KL, mixture": {"kind": "mixture", "rule": amc.RULES["inclusive_kl"]},
}  # fmt: skip

# %%
drawn, avb = {}, {}
for teacher in ("chain", "exact"):
    for name, settings in rules.items():
        drawn[name, teacher], _ = distil(**settings, teacher=teachers[teacher])
for name, contrast in (("AVB", False), ("AVB, adaptive", True)):
    avb[name] = distil("implicit", amc.avb_step, contrast=contrast)
    drawn[name, "chain"] = avb[name][0]


def distance(z):
    return torch.stack([total_variation(z[:, s]) for s in range(num_students)]).mean().item()


def beyond(z, i):
    """Shares of the draws that are past half of the way to either valley of posterior i."""
    sides = [(side * z[..., i, 0] > x_fold[i, 0] / 2).float().mean(0) for side in (-1, 1)]
    return torch.stack(sides)


def lost(z, i):
    """Students that give a valley under a tenth of the posterior's share."""
    return int((beyond(z, i) < 0.1 * beyond(start, i)[:, None]).any(0).sum())


cells_of = {key: (lost(z, 1), lost(z, 2), distance(z)) for key, z in drawn.items()}
rows = [(n, *cells_of[n, "chain"], *cells_of.get((n, "exact"), [None] * 3)) for n in [*rules, *avb]]
header = [f"of {num_students} students", "chain: lost, low pass", "lost, high pass", "TV"]
header += ["exact: lost, low pass", "lost, high pass", "TV"]
markdown_table(header, rows)


# %% tags=["hide-input"]
def show_panels(shown, ncols, size, num_shown):
    """Draws ``{title: [N, 2]}`` over the third posterior, each on its own panel."""
    rows, posterior = len(shown) // ncols, partial(fold.log_joint, x_fold[2:])
    figsize = (size * ncols, (size + 0.05) * rows)
    _, panels = plt.subplots(rows, ncols, sharex=True, sharey=True, figsize=figsize)
    for panel, (title, z) in zip(panels.flat, shown.items(), strict=True):
        plotting.show_density(posterior, window, ax=panel, num_points=81)
        panel.plot(*z[:num_shown].T, ".", color=orange, ms=3, mew=0, alpha=0.6)
        panel.set_title(title, fontsize=9)
        panel.set(xlim=window[:2], ylim=window[2:])


# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-amc-rules", "caption": "The first student of each rule on the third posterior (green). Above, taught by the chain of five steps; below, by exact draws. AVB has no teacher. Shape and coverage are different virtues."}, "image": {"alt": "Two rows of six panels with two green valleys and orange points. Above, the implicit students fill one valley, the mixture both. Below, the GAN fills one and the MMD student hardly leaves it; the Wasserstein student draws a bridge between both, the Gaussian spreads over everything, the mixture fills both."}}
names, shown = {"chain": [*rules, "AVB"], "exact": [*rules, "AVB, adaptive"]}, {}
for teacher, row in names.items():
    for name in row:
        z = drawn.get((name, teacher), drawn[name, "chain"])[:, 0, 2]
        shown[name if name in avb else f"{name}, {teacher}"] = z
show_panels(shown, ncols=6, size=1.35, num_shown=150)
plt.show()

# %%
# NBVAL_CHECK_OUTPUT
most = num_students / 2
print("exact teacher, most GAN students lose a mode:", cells_of["GAN", "exact"][1] > most)
print("exact teacher, a mixture student by KL does: ", cells_of["KL, mixture", "exact"][1] > 0)
print("chain, most GAN students lose a mode:        ", cells_of["GAN", "chain"][1] > most)

# %% [markdown]
# A student has *lost* a mode if it puts under a tenth of the posterior's share past half of the way to it. There are two ways to lose one.
#
# - *By the rule.* At these settings GAN students drop the valley behind the high pass although the exact teacher shows it to them in every batch. The game rewards draws that pass for the teacher's; it hardly punishes draws that are missing.
#   MMD students are merely slow: given four times the steps (`num_steps=600`) nearly all find both valleys, and the GAN students still do not. The Wasserstein game covers both, with draws on the bridge between them.
#   The inclusive divergence must: a $q_\phi$ that is nearly zero where the teacher goes pays without limit.
# - *By the chain.* A teacher who starts where the student stands cannot show it a valley that the student has left. Five steps hardly ever cross the ridge, so under the chain nearly *every* share of the two valleys is a fixed point of {eq}`eq-amc-loop`,
#   nothing included. Wasserstein students now lose modes too. Only a student with room for two modes, under the rule that forgives no gap, keeps both as a rule. Its shares still wander, and no share is safe.
#
# So the chain mends the shape of a mode and the rule keeps the modes; neither finds one. Start wide.
#
# ### Without a chain: adversarial variational Bayes
#
# AVB uses the same game for the other direction {cite:p}`mescheder2017avb`. A discriminator $S$ tells draws of $q_\phi$ from draws of the prior, so that $S^* = \log q_\phi(z \mid x) - \log p(z)$, and student and decoder descend
#
# $$
# \mathbb{E}_{q_\phi}\bigl[S(x, z) - \log p_\theta(x \mid z)\bigr].
# $$ (eq-amc-avb)
#
# At $S^*$ this is the negative bound. The prior is far from a sharp posterior, and then any $S$ tells them apart without learning their shapes.
# *Adaptive contrast* compares with a Gaussian that has the student's own moments instead. In the table above it improves the shape. Both are mode-seeking, as their divergence says.
#
# With any other $S$ than $S^*$ the number is **no bound**. On the fold $\log p(x)$ is known, so we can catch it.

# %%
rows = []
for name, (z, networks) in avb.items():
    z = z.flatten(1, 2)
    contrast = adversarial.adaptive_contrast(z) if name == "AVB, adaptive" else None
    x = x_fold.repeat(num_students, 1)
    with torch.no_grad():
        bound = -adversarial.avb_loss(fold, networks["discriminator"], x, z, contrast)
    excess = bound.reshape(num_students, 3) - log_evidence
    rows.append((name, int((excess > 0.1).sum()), excess.numel(), excess.max().item()))
markdown_table(["“bound” minus exact log p(x)", "above 0.1", "of", "highest, nats"], rows)

# %% [markdown]
# No true bound is above zero in this table, and a student that dropped one of two equal valleys has one at least $\log 2$ below. Evaluate AVB by annealing, never by its discriminator.
#
# ## Open questions, asked of the toy
#
# *Which combination, at equal cost? And may one reuse $q_1, \dots, q_{T-1}$?* The talk ends with these. Five gradients per draw buy five Langevin steps, five with a test, or one Hamiltonian trajectory.
# The path costs nothing extra: let all of $z_1, \dots, z_T$ teach.

# %%
rows = []
for name in ("GAN", "KL, mixture"):
    for teacher in ("path", "MALA", "HMC"):
        drawn[name, teacher], _ = distil(**rules[name], teacher=teachers[teacher])
    rows.append((name, *(distance(drawn[name, t]) for t in ("chain", "path", "MALA", "HMC"))))
markdown_table(["TV, mean over students", "end of chain", "whole path", "MALA", "HMC"], rows)

# %% [markdown]
# Here the rule and the family matter far more than the kernel or the path. Reuse brings no clear gain: there are more lessons, but the early $z_t$ are worse teachers. One trajectory teaches the GAN less well than five small steps.
# One toy is no verdict on thirty-two dimensions; the rows with other kernels and rules are part of the study below.
#
# *Another mixture of the two ideas?* {cite:t}`titsias2017reparam` keeps the student fixed and learns the *coordinates of the chain*. Write $z = g_\phi(\varepsilon)$ with $g_\phi$ invertible, start at $\varepsilon_0 \sim \mathcal{N}(0, I)$, and run the chain on
#
# $$
# \log \tilde\pi_\phi(\varepsilon) = \log p_\theta(x, g_\phi(\varepsilon)) + \log \lvert \det \nabla g_\phi(\varepsilon) \rvert .
# $$ (eq-amc-titsias)
#
# The law of $g_\phi(\varepsilon_T)$ is the approximation, implicit and without a discriminator. To learn $\phi$, hold $\varepsilon_T$ fixed and ascend $\mathbb{E} \log \tilde\pi_\phi(\varepsilon_T)$, a Monte Carlo EM step. We try an affine $g_\phi$ for each $x$, with the very step of 0.2 that failed above.

# %%
mean, factor = torch.zeros(3, 2, requires_grad=True), torch.eye(2).repeat(3, 1, 1).requires_grad_()
to_z = lambda noise: mean + (factor @ noise[..., None]).squeeze(-1)  # noqa: E731
log_target = lambda e: fold.log_joint(x_fold, to_z(e)) + torch.linalg.slogdet(factor)[1]  # noqa: E731


def five_steps(log_density, num_samples):
    kernel = partial(mcmc.langevin_step, logdensity_fn=log_density, step_size=0.2)
    return mcmc.sample_chain(kernel, torch.randn(num_samples, 3, 2), 1, thin=5).samples[0]


optimizer = Adam([mean, factor], lr=0.02)
for _ in range(num_steps):
    amc.descend(-log_target(five_steps(log_target, 64)), optimizer)

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-amc-titsias", "caption": "Five unadjusted steps of 0.2 on the third posterior: in $z$ from the prior; $g_\\phi$ alone, without a chain; and in the learnt coordinates of {eq}`eq-amc-titsias`."}, "image": {"alt": "Three panels with two green valleys. In the first, points scatter far around them; in the second they form one tilted cloud; in the third they lie in the valleys."}}
with torch.no_grad():
    plain = five_steps(partial(fold.log_joint, x_fold), num_draws)
    alone = to_z(torch.randn(num_draws, 3, 2))
    mapped = to_z(five_steps(log_target, num_draws))
assert num_steps < 100 or (total_variation(mapped) < total_variation(plain)).all()
moved = {"chain in z": plain, "map alone": alone, "chain in ε, mapped": mapped}
shown = {f"{n}: TV {total_variation(z)[2]:.2f}": z[:, 2] for n, z in moved.items()}
show_panels(shown, ncols=3, size=1.8, num_shown=250)
plt.show()

# %% [markdown]
# The map makes the posterior round, and a step that was too long in $z$ is right in $\varepsilon$. The chain still runs at test time.
#
# *Discrete latents?* A chain needs no gradient in $z$, and neither does the inclusive rule. Six switches, three noisy sums, and a chain that flips one switch at a time:


# %%
class Switches(LatentVariableModel):
    wiring = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 1, 1]])

    def prior(self):
        return Independent(Bernoulli(torch.full((6,), 0.3), validate_args=False), 1)

    def likelihood(self, z):
        return Independent(Normal(z @ self.wiring.T, 0.5, validate_args=False), 1)


def flips(x, z):
    for _ in range(10):
        one = nn.functional.one_hot(torch.randint(6, z.shape[:-1]), 6).bool()
        flipped = torch.where(one, 1 - z, z)
        ratio = (switches.log_joint(x, flipped) - switches.log_joint(x, z)).exp()
        z = torch.where((torch.rand_like(ratio) < ratio)[..., None], flipped, z)
    return z


switches, network = Switches(6, 3), nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 6))
bits = lambda x: Independent(Bernoulli(logits=network(x), validate_args=False), 1)  # noqa: E731
optimizers = {"encoder": Adam(network.parameters(), 1e-2)}
for _ in range(num_steps):
    x, _ = switches.sample(64)
    amc.amc_step(x, switches, bits, optimizers, teacher=flips, rule="inclusive_kl", num_samples=4)

states, (x, _) = (
    torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)[:, None],
    switches.sample(500),
)
exact = (switches.log_joint(x, states).softmax(0)[..., None] * states).sum(0)
error = (bits(x).mean - exact).abs().mean().item(), (0.3 - exact).abs().mean().item()
assert num_steps < 100 or error[0] < error[1] / 2
print(f"mean error of P(switch on | x): student {error[0]:.3f}, prior {error[1]:.3f}")

# %% [markdown]
# The student of independent bits learns the marginals, here compared with all 64 states. A GAN as it stands could not: its gradient reaches $\phi$ through $z$, and a bit has none. The library refuses that combination by name.
#
# (sec-amc-table)=
# ## Table 1 as ten recipes
#
# Back to images. Latent of 32 dimensions, convolutional decoder, binarised MNIST {cite:p}`lecun1998mnist`. Gaussian encoder: the decoder reversed. CNN-G: Gaussian noise next to the features. CNN-B: features multiplied by random bits.
# Each published row is the loop {eq}`eq-amc-loop` with parts taken out. *VAE*: no chain, and the bound as the lesson. *MCMC-VI*: the decoder learns from $z_T$, the student from the bound {cite:p}`defreitas2001vmcmc,hoffman2017mcmc`.
# *Persistent*: no student; a stored chain for each image goes on at the next visit.


# %%
TABLE_1 = {  # row: label, and name of the published row
    "vae": ("VAE", "Gaussian | VAE"),
    "mcmc_vi_t5": ("MCMC-VI, T = 5", "Gaussian | MCMC-VI T=5 eta=0.2"),
    "amc_gaussian_t5": ("AMC Gaussian, T = 5", "Gaussian | AMC T=5 eta=0.2"),
    "amc_cnn_g_t5": ("AMC CNN-G, T = 5", "CNN-G | AMC T=5 eta=0.2"),
    "amc_cnn_g_t50": ("AMC CNN-G, T = 50", "CNN-G | AMC T=50 eta=0.02"),
    "avb_cnn_g": ("AVB CNN-G", "CNN-G | AVB"),
    "amc_cnn_b_t5": ("AMC CNN-B, T = 5", "CNN-B | AMC T=5 eta=0.2"),
    "amc_cnn_b_t50": ("AMC CNN-B, T = 50", "CNN-B | AMC T=50 eta=0.02"),
    "avb_cnn_b": ("AVB CNN-B", "CNN-B | AVB"),
    "persistent_t50": ("persistent, T = 50", "none | persistent MCMC T=50 eta=0.02"),
}
labels = {row: label for row, (label, _) in TABLE_1.items()}
table = experiments.select(experiments.load_studies(), "amc_table1", scale="laptop", seed=0)
options = {run.row: run.config for run in table}
columns = {"method": "method", "encoder": "encoder", "T": "num_steps", "η": "step_size"}
rows = [[labels[row], *(options[row][name] for name in columns.values())] for row in labels]
markdown_table(["row", *columns], rows)

# %%
folder = data.data_folder() / "models" / "amc_table1"
if retrain:
    experiments.main(["--root", "retrained", "run", "amc_table1", "--seed", "0"])
    folder = Path("retrained", "data", "models", "amc_table1")


def network(name, role="decoder"):
    module = evaluation.load_module(folder / f"{name}-laptop-seed0-{role}.safetensors")
    return module.requires_grad_(False)


# %%
def train(row, images, num_updates, batch_size=32):
    """The decoder of a row of the table, trained on the images in order."""
    settings = options[row] | {"training_images": len(images)}
    training = recipes.amc_training(settings)
    for index in torch.arange(num_updates * batch_size).split(batch_size):
        index = index % len(images)
        losses = training.step(data.binarise(images[index]), index)
    assert all(loss.isfinite() for loss in losses.values())
    return training.networks["decoder"].requires_grad_(False)


images, x_test = data.load_mnist("train").images, data.load_mnist_binary("test").images
for row in TABLE_1:
    train(row, images[:4], num_updates=1, batch_size=4)

# %% [markdown]
# All ten have taken one step, to show that they can. Two of them take more and are evaluated by annealed importance sampling, in pairs. Their level says little after so few steps; the machinery is what is on trial.

# %%
settings = dict(num_temperatures=num_temperatures, num_leapfrog=5, seed=seed)
settings, estimates = settings | dict(num_chains=4, pilot_chains=2), {}
for name in ("vae", "amc_cnn_g_t5"):
    decoder = train(name, images, train_steps)
    estimates[name] = evaluation.hais_ll(decoder, x_test[:num_images], **settings)
rows = [(labels[n], e.summary, f"{e.ess.mean():.1f} of 4") for n, e in estimates.items()]
change = paired_difference(*(e.log_likelihood for e in reversed(estimates.values())))
rows.append(("second minus first, in pairs", change, None))
markdown_table([f"this run, {train_steps} updates", "log p(x), AIS", "ESS"], rows)

# %% [markdown]
# The committed runs are longer: one pass over the 60,000 images at *laptop* scale, 2,000 passes at *full* scale, three seeds. {py:mod}`amortised.experiments` makes them; their settings were fixed before anything was evaluated.

# %%
study = tables.load_study("amc_table1", "laptop")
annealed = {row["row"]: row["value"] for row in published}
annealed = {row: annealed[name] for row, (_, name) in TABLE_1.items()}
display(tables.study_table("amc_table1", labels, "ais_ll", annealed))
pairs = [(name, "vae") for name in list(TABLE_1)[1:]] + [("amc_cnn_g_t50", "persistent_t50")]
pairs += [(f"amc_{kind}_t50", f"amc_{kind}_t5") for kind in ("cnn_g", "cnn_b")]
display(tables.paired_table(study, pairs, "ais_ll", labels, published=annealed))
columns = {"IS-LL, own q": "is_ll", "IS-ESS": "is_ess", "IS-LL, fitted q": "posthoc_is_ll"}
columns |= {"AIS-ESS": "ais_ess", "certificate": "simulated_gap"}
given = {}
for metric in ("IS-LL", "IS-ESS", "HAIS-ESS"):
    values = {row["row"]: row["value"] for row in load_published("amc", metric=metric)}
    given[f"published {metric}"] = {r: values[n] for r, (_, n) in TABLE_1.items()}
tables.metric_table(study, labels, columns, decimals=1, with_seeds=False, given=given)

# %% [markdown]
# *First table.* A cell is the mean with its standard error over images, and in brackets the half width of Student's 95 % interval over the three seeds.
# Columns are different experiments: the published decoders were trained to convergence, a laptop decoder has seen each digit once. So do not expect the published order. At this age the bound has not yet taught the VAE to use its latents, and most rows that give the decoder a livelier $z$ are ahead.
# Further rows wait for the full scale: each row with $\eta$ once more with $2\eta$, a Gaussian student with the inclusive rule, with a Metropolis test and with Hamiltonian teachers, and a Wasserstein game.
#
# *Second table.* Only differences within a column carry meaning, taken over the same images. The source's headline, CNN-G with $T = 50$ above persistent chains, is a fraction of a nat, without an error.
# After one pass the sign is the opposite: chains that work on each image by itself need no student who first has to learn. The headline is a claim about the end of training, and only the full scale can test it.
#
# %% [markdown]
# *Third table*, with errors over images only. "Own q" is the row's encoder where it has a density, and otherwise a Gaussian fitted to the finished decoder, as in the column "fitted q". The Gaussian student that a GAN has taught makes a poor proposal, although its decoder is fine.
# Where posteriors are far from Gaussian, importance sampling falls short of annealing by many nats, here and in the source, in much the same rows. The source was right to trust annealing more. The columns of ESS have different maxima, so compare them within a column only.
# The certificate, upper minus lower bound on data that each decoder simulates, says how far the annealing can be trusted, with 8 chains and 100 temperatures. It is several nats for the rows with $T = 50$, so their lead is, if anything, understated.
#
# What do the decoders dream? Equal $z$ in every row.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-amc-samples", "caption": "Samples of the ten decoders at laptop scale, seed 0: means of $p_\\theta(x \\mid z)$ at the same fourteen draws of $z$ from the prior."}, "image": {"alt": "Ten rows of fourteen grey images. The row of the variational autoencoder shows blurred strokes; those with fine chains and the persistent row show more that look like digits."}}
z = torch.randn(14, 32)
dreams = torch.cat([network(name).likelihood(z).mean for name in TABLE_1])
plotting.show_digits(dreams, ncols=14, row_labels=list(labels.values()))
plt.show()

# %% [markdown]
# (sec-amc-imputation)=
# ## Missing pixels
#
# A sampler is only as good as what it is used for. Let $x = (x_o, x_m)$ with $x_m$ missing. The source alternates, from $x_m = 0$:
#
# $$
# z \sim q_\phi(z \mid x_o, x_m), \qquad x_m \sim p_\theta(x_m \mid z).
# $$ (eq-amc-impute)
#
# With the exact posterior in place of $q_\phi$ this is a Gibbs sampler, and its law goes to $p_\theta(x_m \mid x_o)$. With an encoder it goes elsewhere.
# The source has no reference for where it should go. The model has one: anneal chains to $p_\theta(z \mid x_o)$, choose among them by weight, move them on by HMC, and decode.

# %%
trained = {"vae": "vae", "cnn_g": "amc_cnn_g_t50", "cnn_b": "amc_cnn_b_t50"}
networks = {name: (network(row), network(row, "encoder")) for name, row in trained.items()}
generator, x, filled = torch.Generator().manual_seed(seed), x_test[[2, 4]], {}
masks = {kind: imputation.missing_mask(kind, generator=generator) for kind in imputation.MASKS}
annealing = AISSettings(sigmoid_schedule(2 * num_turns), 0.1, num_leapfrog=3)
for kind, mask in masks.items():
    for name, pair in networks.items():
        filled[kind, name] = imputation.impute(*pair, x, mask, num_turns, 5)
    drawn_long = imputation.conditional_samples(
        networks["cnn_g"][0], x, mask, 5, settings=annealing, num_steps=10
    )
    filled[kind, "reference"] = drawn_long.x

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-amc-imputation", "caption": "Two test digits with four masks. Grey: observed. Orange: five imputations by the encoder of each row, {eq}`eq-amc-impute`, and by long chains in the CNN-G row's decoder. First column of each digit: what was covered, in full."}, "image": {"alt": "Four blocks of four rows. In each row two groups of a complete digit and five completions of it; grey parts agree within a block, orange parts differ from copy to copy."}}
names = {"vae": "VAE", "cnn_g": "CNN-G", "cnn_b": "CNN-B", "reference": "reference"}
figure, panels = plt.subplots(4, 1, figsize=(6.0, 7.4))
for panel, (kind, mask) in zip(panels, masks.items(), strict=True):
    shown = torch.stack([torch.cat([x[None], filled[kind, name]]) for name in names])
    hidden = mask & (torch.arange(6) > 0)[:, None, None]
    for part, colour in ((~hidden, plotting.GREY), (hidden, plotting.COLOURS["approximation"])):
        pixels = (shown * part).transpose(1, 2).reshape(-1, 784)
        plotting.show_digits(pixels, 12, ax=panel, colour=colour, row_labels=list(names.values()))
    panel.set_title(kind.replace("_", " "), fontsize=9)
plt.show()

# %% [markdown]
# Two scores for many imputations: the entropy of the labels of their nearest training images, high when they are diverse, and the $\ell_1$ distance to those neighbours per pixel, low when they look like digits {cite:p}`li2018implicit`. Read them together, and beside the reference: *more* diversity than the model's own conditional is an error, too.

# %%
names = {"vae": "VAE", "cnn_g": "CNN-G", "cnn_b": "CNN-B"}
printed = [load_published("amc", table="Table 2", row=source) for source in names.values()]
for number, (column, title) in enumerate({"label_entropy": "entropy", "l1": "l1"}.items()):
    values = {name: row[number]["printed"] for name, row in zip(names, printed, strict=True)}
    titles = {name: f"{source}, {title}" for name, source in names.items()}
    metric = f"lower_half_{column}"
    display(tables.study_table("amc_imputation", titles, metric, values, decimals=3))
scores, rows = tables.load_study("amc_imputation", "laptop"), []
wanted = [who + score for score in ("label_entropy", "l1") for who in ("{}_", "reference_{}_")]
for name, source in names.items():
    for kind in masks:
        metrics = [metric.format(kind) for metric in wanted]
        texts = tables.cells(scores, name, metrics, 3, with_seeds=False)
        rows.append((f"{source}, {kind.replace('_', ' ')}", *texts))
markdown_table(["encoder, mask", "entropy, nats", "reference", "l1 per pixel", "reference"], rows)

# %% [markdown]
# The source does not state its mask; we assume the lower half in the first two tables, and 500 turns at full scale.
# *Third table*, at laptop scale with errors over images. The VAE stays close to its reference. The AMC encoders do not: with every mask their entropy lies above the reference and their images lie further from any training digit, in every seed. In {numref}`fig-amc-imputation` one sees why. The game has left them with codes that are typical of no image, and each turn feeds the error back.
# The source reads high entropy as a virtue. Without the reference nobody can tell it from noise. The reference has a weakness of its own: at this scale a few of its ten annealed chains carry most of the weight, so its entropy is somewhat too low.
#
# %% [markdown]
# ## Convergence and cost
#
# The unit of cost is an evaluation of the decoder with its gradient. First a model whose $\log p_\theta(x)$ is exact: the linear one of chapter 1, with a Gaussian student and the inclusive rule, at equal numbers of evaluations.

# %%
truth = LinearGaussian(torch.randn(8, 2), torch.randn(8), noise_scale=1.0)
toy_data, _ = truth.sample(200)


def learn(method, steps=1):
    """Mean exact log p(x) of the data against decoder evaluations for each of them."""
    budget = min(100, num_steps)
    model, chains = LinearGaussian(0.1 * torch.randn(8, 2), torch.zeros(8), 1.0), None
    model.likelihood = counter = CallCounter(model.likelihood)
    networks, history = {"model": model, "encoder": GaussianEncoder(2, nn.Identity(), 8)}, []
    if method == "persistent":
        chains = amc.PersistentChains(200, 2)
        del networks["encoder"]
    optimizers = {name: Adam(network.parameters(), 0.05) for name, network in networks.items()}
    common = (model, networks.get("encoder"), optimizers)
    teacher = partial(amc.teacher_samples, model, num_steps=steps, step_size=0.1)
    lesson = {"teacher": teacher, "rule": "inclusive_kl"}
    while (spent := counter.points / 200) < budget:
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - spent / budget)
        index = torch.randperm(200)[:40]
        if method == "VAE":
            amc.vae_step(toy_data[index], *common)
        elif method == "AMC":
            amc.amc_step(toy_data[index], *common, **lesson)
        else:
            amc.persistent_step(toy_data[index], index, model, chains, optimizers, teacher=teacher)
        history.append((counter.points / 200, model.log_evidence(toy_data).mean().item()))
    return torch.tensor(history)


# %% tags=["hide-input"]
def show_runs(panels, runs):
    """Log-likelihoods with bars of two standard errors, against two costs."""
    for i, (label, *costs, level, error) in enumerate(runs):
        style = {"fmt": "osD^vPX*<>"[i % 10], "color": f"C{i}", "label": label}
        for panel, cost in zip(panels, costs, strict=True):
            panel.errorbar(cost, level, 2 * error, ms=5, elinewidth=0.8, **style)
    panels[0].set(xscale="log", xlabel="evaluations, each image")
    panels[0].set_ylabel("log p(x), nats")
    panels[1].set(xscale="log", xlabel="minutes of training")
    panels[1].sharey(panels[0])


# %% tags=["hide-input"]
def cost_of(row):
    """Label, evaluations for each image, minutes of training, level and its error."""
    details = [run.record["details"] for run in study[row]]
    evaluations = options[row]["epochs"] + details[0]["chain_gradients_per_image"]
    minutes = sum(d["seconds"]["training"] for d in details) / len(details) / 60
    level = tables.pool([run.per_image["ais_ll"] for run in study[row]])
    return labels[row], evaluations, minutes, level.mean, level.image_se


curves = {f"AMC, T = {steps}": learn("AMC", steps) for steps in (1, 5, 20)}
curves |= {"VAE": learn("VAE"), "persistent, T = 5": learn("persistent", 5)}
path = data.data_folder() / "results" / "reference" / "vae-laptop-seed0.json"
record, level = results.load_result(path)
passes = record["config"]["epochs"]
minutes = record["details"]["seconds"]["training"] / 60
reference = (f"VAE, {passes} passes", passes, minutes, *tables.pool([level["ais_ll"]])[:2])
best = max(curve[:, 1].max() for curve in curves.values())

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-amc-cost", "caption": "Left: exact $\\log p_\\theta(x)$ below the best of all runs, linear model, against decoder evaluations for each observation. Middle and right: the recorded laptop runs of Table 1, against decoder evaluations for each training image and against the wall time of training, on a shared machine; bars are two standard errors over images."}, "image": {"alt": "Left, five falling curves on logarithmic axes; the variational autoencoder falls first. Middle and right, eleven points: of the laptop rows those with long chains stand highest, and the variational autoencoder with 120 passes far above them."}}
figure, axes = plt.subplots(1, 3, figsize=(7.6, 3.9), width_ratios=(1.25, 1, 1))
for name, style in zip(curves, ("-", "--", "-.", ":", "-"), strict=True):
    axes[0].plot(curves[name][:, 0], best - curves[name][:, 1], style, label=name)
axes[0].set(xscale="log", yscale="log", ylim=(0.01, None))
axes[0].set(xlabel="evaluations, each observation", ylabel="nats below the best")
axes[0].legend(fontsize=7, loc="lower left")
show_runs(axes[1:], [*map(cost_of, labels), reference])
handles = axes[1].get_legend_handles_labels()
figure.legend(*handles, fontsize=7, ncols=5, loc="outside upper center")
plt.show()

# %% [markdown]
# For a posterior that the student can match, the bound is the cheaper teacher: each of its evaluations moves student and decoder, while $T$ of the $T + 1$ evaluations of AMC only move $z$. No method with a chain has arrived when this budget is spent.
# On images and after *equal passes* the rows with $T = 50$ stand highest, but they have spent fifty times the evaluations. At *equal cost* the comparison turns: the decoder of chapter 6, a plain VAE with 120 passes (and annealed with more temperatures), is far above every one of them.
# The case for AMC must rest on where training ends, not on how fast it gets there, and needs the full scale.
#
# The other half of the bill comes at test time. We count.

# %%
rows, decoder = [], network("vae")
decoder.likelihood = counter = CallCounter(decoder.likelihood)
kept = {"gaussian": GaussianEncoder(32), "cnn_g": ImplicitEncoder(32)}
for name in ("vae", "mcmc_vi_t5", "amc_cnn_g_t50", "persistent_t50"):
    row, counter.points, z = options[name], 0, torch.randn(1, 1, 32)
    chain = {key: row[key] for key in ("num_steps", "step_size")}
    if row["method"] in ("mcmc_vi", "persistent"):  # the others are done when z is drawn
        amc.teacher_samples(decoder, x_test[:1], z, **chain)
    state = kept.get(row["encoder"], amc.PersistentChains(60_000, 32)).state_dict().values()
    rows.append((labels[name], counter.points, 4e-6 * sum(tensor.numel() for tensor in state)))
display(markdown_table(["a draw for a new image", "decoder gradients", "MB kept"], rows))
tables.run_table(study, "amc_table1", labels)

# %% [markdown]
# AMC, AVB and the VAE draw at once. MCMC-VI needs its chain, because its student was never told about $q_T$. A persistent chain has nothing for a new image: 50 steps from the prior leave 0.6 of the start in unused directions.
# Memory: $N K D$ numbers grow with the data and with the number $K$ of chains; an encoder does neither. For one chain on MNIST that is a few megabytes, hardly an argument; for a million images and ten chains it is one.
#
# ## What the source leaves open, and what we assumed
#
# - *The step.* "Stepsize $\eta$" may be ours or half of it: texts with drift $h \nabla$ and noise $\sqrt{2h}$ mean $\eta = 2h$. Hence the rows with $2\eta$.
# - *HAIS.* The name stands for two algorithms (chapter 6). Our column is annealing with fresh momentum and five leapfrog steps at each temperature, probably what the source ran.
# - *The proposal of IS.* Rows without a density, and persistent chains without any encoder, still have a published IS value. We fit a Gaussian afterwards, with the decoder frozen. A $q$ fitted by the bound is too narrow, so this column is low.
# - *ESS.* The maxima are 5000 and 100 in the source, 1000 and 8 here. No ESS sees a mode that no sample found.
# - *Everything else*: latent size, networks beyond their type, optimisers, updates per batch, samples per image, binarisation, mask and number of turns in Table 2. No published log-likelihood carries an error, and a lead of a fraction of a nat needs one.
#
# ## Summary
#
# - *Three steps.* Improve, learn, distil {eq}`eq-amc-loop`. Take one away and you have MCMC-VI, persistent chains, AVB or the VAE.
# - *One formula.* Unadjusted steps are stable for $\lambda < 4 / \eta$ and inflate the variance by $1 / (1 - \eta\lambda/4)$. The decoder adapts to the teacher's blur, and a published table splits in two.
# - *Rules.* GAN students lose modes even under a perfect teacher. MMD and Wasserstein students lose them when the chain cannot show the mode. The inclusive rule does not of its own accord, but it wants a density.
# - *Ten recipes.* Compare within a column, in pairs, with seeds. An importance-sampling column and a discriminator's "bound" are not to be trusted where posteriors are odd.
# - *Imputation.* Diversity has a right amount, and the model's own conditional says which.
#
# ## Exercises
#
# ```{exercise} The teacher's fixed point
# :label: ex-amc-fixed
# The posterior is $\mathcal{N}(0, 1/\lambda)$, the student $\mathcal{N}(0, v)$, the teacher $T$ unadjusted steps, and the lesson exact. Find the fixed point of $v$. Does it depend on $T$? On $\eta$? Check yours for $\lambda = 5$, $\eta = 0.2$, $T = 3$:
#
# ~~~python
# checks.close(v, your_fixed_point, rtol=1e-3, label="the fixed point")
# ~~~
# ```
#
# ```{solution-start} ex-amc-fixed
# :label: sol-amc-fixed
# :class: dropdown
# ```
#
# One step maps $v$ to $a^2 v + \eta$. Its fixed point is the $v$ of {eq}`eq-amc-ula`, and $T$ such maps have the same one. $T$ sets the speed, $a^{2T}$ a round; $\eta$ sets the bias. Distillation neither adds to it nor removes it.

# %%
# NBVAL_CHECK_OUTPUT
v, a = 1.0, 1 - 0.2 * 5 / 2
for _ in range(20):  # rounds of improving and distilling
    for _ in range(3):
        v = a**2 * v + 0.2
your_fixed_point = (1 / 5) / (1 - 0.2 * 5 / 4)
checks.close(v, your_fixed_point, rtol=1e-3, label="the fixed point")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} The best discriminator
# :label: ex-amc-discriminator
# Show that $D^*$ in {eq}`eq-amc-gan` is the log-ratio of the densities. For $q_T = \mathcal{N}(1, 1)$ and $q = \mathcal{N}(0, 1)$ it is a straight line: which? Check that the loss is flat there:
#
# ~~~python
# checks.close(slope, 0.0, atol=0.01, label="the slope of the loss at your line")
# ~~~
# ```
#
# ```{solution-start} ex-amc-discriminator
# :label: sol-amc-discriminator
# :class: dropdown
# ```
#
# At each $z$ minimise $q_T \operatorname{softplus}(-D) + q \operatorname{softplus}(D)$. The derivative in $D$ is $-q_T\, \sigma(-D) + q\, \sigma(D)$, and it vanishes where $\sigma(D) / \sigma(-D) = e^D = q_T / q$. Here $\log q_T - \log q = z - \tfrac12$.

# %%
# NBVAL_CHECK_OUTPUT
weight = torch.tensor([1.0, -0.5], requires_grad=True)  # your line
z_student = torch.randn(400_000, 1, 1)
loss = adversarial.discriminator_loss(
    lambda x, z: weight[0] * z[..., 0] + weight[1], torch.zeros(1, 1), z_student + 1, z_student
)
(slope,) = torch.autograd.grad(loss.sum(), weight)
checks.close(slope, [0.0, 0.0], atol=0.01, label="the slope of the loss at your line")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Whose z?
# :label: ex-amc-whose
# Train the decoder of the linear model once on the student's $z$ and once on the teacher's (a step of it is `amc.descend(-model.log_joint(x, z), optimizer)`), with a student that is held far too narrow. Which one learns a noise scale that is too small, and why? Check the sign:
#
# ~~~python
# checks.ordered(noise["student"], noise["teacher"], label="the order of the noise scales")
# ~~~
# ```
#
# ```{solution-start} ex-amc-whose
# :label: sol-amc-whose
# :class: dropdown
# ```
#
# Narrow $z$ explain $x$ too well: the residuals that set $\sigma$ miss the part that comes from posterior uncertainty. The chain puts that part back, more of it with more steps.

# %%
# NBVAL_CHECK_OUTPUT
noise = {}
for whose in ("student", "teacher"):
    model = LinearGaussian(truth.weight.detach(), truth.bias.detach(), noise_scale=1.0)
    narrow = lambda x, model=model: Independent(Normal(model.posterior(x).mean, 0.01), 1)  # noqa: E731
    teacher = partial(amc.teacher_samples, model, num_steps=10, step_size=0.1)
    optimizer = Adam(model.parameters(), 0.02)
    for _ in range(40):
        x_toy = toy_data[torch.randperm(200)[:40]]
        z = narrow(x_toy).sample((1,))
        z = teacher(x_toy, z) if whose == "teacher" else z
        amc.descend(-model.log_joint(x_toy, z), optimizer)
    noise[whose] = model.noise_scale.item()
checks.ordered(noise["student"], noise["teacher"], label="the order of the noise scales")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} When do chains outgrow an encoder?
# :label: ex-amc-memory
# Take $D = 128$ latents and $K = 10$ persistent chains in single precision. From how many images on do they take more memory than an encoder of ten million weights? What else is lost when the images are augmented at random at each visit?
# ```
#
# ```{solution} ex-amc-memory
# :label: sol-amc-memory
# :class: dropdown
#
# $4 N K D$ bytes exceed $4 \cdot 10^7$ at $N = 10^7 / 1280 \approx 7{,}800$ images. Under augmentation each visit shows another $x$, so a stored $z$ was improved for a different posterior. The binarisation of MNIST at each visit is already such an augmentation.
# ```
#
# ## References
#
# ```{bibliography}
# :filter: docname in docnames
# ```
