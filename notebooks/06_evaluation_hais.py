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

# %% [markdown] tags=["slide"]
# # Evaluation you can trust: annealed importance sampling and HAIS
#
# *About a minute on one core. You need the evidence lower bound and Hamiltonian Monte Carlo, as {doc}`/chapters/01_vi_recap` leaves them.*
#
# ```{admonition} What you will be able to do
# :class: tip
# - say why a lower bound cannot rank two models, and build two models that it ranks wrongly;
# - predict when importance sampling fails, and what its effective sample size tells you of that;
# - derive annealed importance sampling, write it in ten lines, and say what carried momentum adds;
# - certify an estimator from both sides with bidirectional Monte Carlo, and say what that does not certify;
# - tell a posterior that is far from Gaussian from one that is Gaussian and correlated, and choose the estimator by it;
# - evaluate a decoder of your own with numbers that another person can check.
# ```

# %% tags=["parameters"]
seed: int = 0  # of every random stream in this chapter
num_toy_runs: int = 1000  # independent chains behind each point of the toy figures
num_images: int = 12  # random test images for each trained decoder
num_pairs: int = 16  # pairs simulated from a decoder, for each certificate
num_chains: int = 4  # annealed chains per image
num_temperatures: int = 500  # temperatures of HAIS, hence gradients per chain
num_leapfrog: int = 5  # leapfrog steps per temperature of AIS+HMC
num_samples: int = 5000  # importance samples for each toy observation
num_control: int = 10_000  # random test images that the control variate sees
device: str = "cpu"  # where the trained decoder is evaluated

# %% tags=["hide-input"]
from amortised import checks

checks.parameters(
    globals(),
    seed=checks.integer(minimum=0, maximum=2**32 - 1),
    num_toy_runs=checks.integer(minimum=100, maximum=50_000),
    num_images=checks.integer(minimum=2, maximum=10_000),
    num_pairs=checks.integer(minimum=2, maximum=1000),
    num_chains=checks.integer(minimum=2, maximum=1000),
    num_temperatures=checks.integer(minimum=40, maximum=100_000),
    num_leapfrog=checks.integer(minimum=1, maximum=20),
    num_samples=checks.integer(minimum=10, maximum=20_000),
    num_control=checks.integer(minimum=100, maximum=10_000),
    device=checks.device(),
)

# %% tags=["hide-input"]
import itertools
import math
from functools import partial

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from torch import nn
from torch.distributions import Independent, Normal

# %% tags=["hide-input"]
from amortised import data, evaluation, plotting, results, tables
from amortised.ais import (
    AISSettings,
    AnnealedPath,
    ais,
    bdmc,
    linear_schedule,
    log_prob_and_grad,
    sigmoid_schedule,
)
from amortised.fast import log_likelihood_and_grad
from amortised.mcmc import hmc_step
from amortised.models import BernoulliDecoder, LinearGaussian
from amortised.numerics import effective_sample_size, log_mean_exp

plotting.use_style()


def stream(offset: int) -> torch.Generator:
    """A random stream of its own for each experiment."""
    return torch.Generator().manual_seed(1000 * seed + offset)


# %% [markdown] tags=["slide"]
# Every table in this book ends in a column of log-likelihoods. This chapter is about whether to believe it.
#
# The integral $p_\theta(x) = \int p(z)\, p_\theta(x \mid z)\, dz$ has no closed form, so a table prints an *estimate*. An estimate can be too low for two reasons: the model is bad, or the estimator is. A reader cannot tell which. We want estimates whose error we can bound.
#
# ## Why a bound cannot rank models
#
# The evidence lower bound misses $\log p_\theta(x)$ by $\operatorname{KL}(q \,\|\, p_\theta(z \mid x))$. If that gap were the same for all models, nothing would be lost. It is not. Worse, it can change while the model does not change at all.
#
# Take the linear-Gaussian model $z \sim \mathcal{N}(0, I)$, $x \mid z \sim \mathcal{N}(Wz + b, \sigma^2 I)$. Its evidence depends on $W$ only through $W W^\top$. Replace $W$ by $W R$ with a rotation $R$, and the distribution of $x$ is *the same*. The posterior, however, turns with $R$, and a mean-field $q$ fits it well or badly:
#
# $$
# \log p(x) - \max_{q \text{ diagonal}} \mathcal{L}(x; q)
#   = \tfrac12 \Bigl(\sum_j \log \Lambda_{jj} - \log \det \Lambda\Bigr),
# \qquad \Lambda = I + W^\top W / \sigma^2 .
# $$ (eq-eval-meanfield)


# %%
def rotated_model(angle: float, noise_scale: float) -> LinearGaussian:
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.3], [1.0, 0.2]], dtype=torch.float64)
    c, s = math.cos(angle), math.sin(angle)
    rotation = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return LinearGaussian(weight @ rotation, torch.zeros(3).double(), noise_scale)


def mean_field_gap(model: LinearGaussian) -> float:
    precision = model.posterior(torch.zeros(1, 3).double()).precision_matrix[0]
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()


# %% [markdown]
# Model A generated the data below. Model B has too much noise, so it is truly the worse model. But A's latent axes are turned by 45 degrees, and B's are not.

# %% tags=["slide"] mystnb={"table": {"name": "tab-eval-rotated", "caption": "Two linear models on data of model A: exact $\\log p(x)$, mean ± standard error over 2,000 observations, and the best bound that a mean-field Gaussian reaches, in nats."}}
model_a, model_b = rotated_model(math.pi / 4, 0.5), rotated_model(0.0, 0.65)
z = torch.randn(2000, 2, generator=stream(1), dtype=torch.float64)
noise = torch.randn(2000, 3, generator=stream(2), dtype=torch.float64)
x_linear = (z @ model_a.weight.T + 0.5 * noise).detach()

by_model = [m.log_evidence(x_linear) for m in (model_a, model_b)]
evidence = [results.mean_and_se(values) for values in by_model]
gaps = [mean_field_gap(m) for m in (model_a, model_b)]
difference = results.paired_difference(*by_model)
columns = ["model", "mean log p(x), exact", "best mean-field bound"]
lines = zip("AB", evidence, gaps, strict=True)
results.markdown_table(columns, [[n, e, e.mean - g] for n, e, g in lines])

# %%
# NBVAL_CHECK_OUTPUT
by_evidence = "A" if difference.mean > 4 * difference.se else "B"
by_bound = "A" if difference.mean > gaps[0] - gaps[1] else "B"
print(f"better by the exact evidence: {by_evidence}; by the bound: {by_bound}")
print(f"mean-field gaps: A {gaps[0]:.2f}, B {gaps[1]:.2f} nats")

# %% [markdown] tags=["slide"]
# The bound prefers the wrong model, with the *best possible* mean-field $q$ and no amortisation error. Training by the bound, a model learns to have posteriors that its $q$ can follow. That is a property of the pair, not of $p_\theta(x)$. To compare decoders we must estimate $p_\theta(x)$ itself.
#
# ## Importance sampling, and how it fails
#
# Draw $z_k \sim r(z \mid x)$ and average the weights $w_k = p_\theta(x, z_k) / r(z_k \mid x)$. The mean of the weights is unbiased, so by Jensen's inequality its logarithm is too low on average. How much too low depends on the variance of $w$, and variances of products grow exponentially with the number of factors.
#
# We watch this where the truth is known: $D$ independent copies of $z \sim \mathcal{N}(0,1)$, $x \mid z \sim \mathcal{N}(z, \sigma^2)$. Three proposals are tried: the prior; the exact posterior with its standard deviations halved, since a $q$ trained by the bound errs on that side; and the posterior widened by 30 %.
#
# A diagnosis rides along. The effective sample size
#
# $$
# \mathrm{ESS} = \frac{(\sum_k w_k)^2}{\sum_k w_k^2}
# $$ (eq-eval-ess)
#
# lies between 1 and $K$, and the delta method turns it into a standard error for $\log \hat p$, namely $\sqrt{1/\mathrm{ESS} - 1/K}$. How does it compare with the error that was really made?

# %%
noise_scale = 0.3


def independent_model(dim: int) -> LinearGaussian:
    weight, bias = torch.eye(dim).double(), torch.zeros(dim).double()
    return LinearGaussian(weight, bias, noise_scale)


@torch.no_grad()
def log_weights_of(dim: int, width: float | None, num_images: int = 200):
    """Log-weights of a proposal, and log p(x), for data from the model."""
    model, generator = independent_model(dim), stream(3)
    x = torch.randn(num_images, dim, generator=generator, dtype=torch.float64)
    x = math.sqrt(1 + noise_scale**2) * x  # its distribution under the model
    exact = model.posterior(x)
    mean, sd = 0.0 * x, 1.0  # of the prior
    if width is not None:
        mean, sd = exact.mean, width * exact.stddev
    shape = (num_samples, *x.shape)
    z = mean + sd * torch.randn(shape, generator=generator, dtype=torch.float64)
    log_r = Independent(Normal(mean, sd), 1).log_prob(z)
    return model.log_joint(x, z) - log_r, model.log_evidence(x)


# %%
def importance_sampling(dim: int, width: float | None) -> list[float]:
    """Mean error, its root mean square, what the ESS suggests, and the ESS."""
    log_weights, truth = log_weights_of(dim, width)
    error = log_mean_exp(log_weights, dim=0) - truth
    ess = effective_sample_size(log_weights)
    suggested = (1 / ess - 1 / num_samples).sqrt()
    rms = error.square().mean().sqrt()
    return [v.item() for v in (error.mean(), rms, suggested.mean(), ess.mean())]


dims = [1, 2, 4, 8, 16, 32]
proposals = {"prior": None, "posterior, half as wide": 0.5}
proposals["posterior, 30 % wider"] = 1.3
curves = {
    name: torch.tensor([importance_sampling(d, width) for d in dims])
    for name, width in proposals.items()
}

# %% tags=["hide-input", "slide"] mystnb={"figure": {"name": "fig-eval-is", "caption": "Importance sampling with a fixed number of samples, on a model whose evidence is known. Left: mean error in nats; zero is exact. Right: root-mean-square error, in units of the standard error that the effective sample size suggests; at the dotted line the suggestion is right."}, "image": {"alt": "Two panels against the dimension of the latent. Left, the error of the prior proposal falls to a hundred nats below zero, that of the narrow posterior to nearly four nats, and that of the wide one stays near zero. Right, the wide proposal stays near one; the narrow one lies between one and a half and four in up to sixteen dimensions and reaches nearly eight in 32; the prior stays below two in up to four dimensions and then rises to one hundred."}}
figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2))
for (name, values), marker in zip(curves.items(), "osD", strict=True):
    axes[0].plot(dims, values[:, 0], marker=marker, label=name)
    axes[1].plot(dims, values[:, 1] / values[:, 2], marker=marker)
axes[0].set(xlabel="latent dimension D", ylabel="error, nats")
axes[0].set(xscale="log", yscale="symlog")
axes[0].set_ylim(top=1.0)
axes[0].set_yticks([0, -1, -10, -100], labels=["0", "−1", "−10", "−100"])
axes[1].axhline(1.0, color=plotting.GREY, linestyle=":")
axes[1].set(xlabel="latent dimension D", ylabel="error / suggested error")
axes[1].set(xscale="log", yscale="log")
axes[0].legend(fontsize="small", loc="lower left")
for ax in axes:
    ax.set_xticks(dims, labels=dims)
    ax.minorticks_off()
plt.show()

# %% mystnb={"table": {"name": "tab-eval-is", "caption": "Importance sampling against the exact $\\log p(x)$ in 8 and 32 dimensions: mean and root-mean-square error in nats, the error in nats that the effective sample size suggests, and the mean of that size."}}
# NBVAL_CHECK_OUTPUT
rows = []
for name, values in curves.items():
    for i in (3, 5):
        error, rms, suggested, ess = values[i].tolist()
        rows.append([f"{name}, D = {dims[i]}", error, rms, suggested, f"{ess:.0f}"])
columns = ["proposal", "mean error", "rms error", "the ESS suggests"]
results.markdown_table([*columns, f"ESS of {num_samples}"], rows)

# %% [markdown]
# From the prior, importance sampling is hopeless beyond a few dimensions: {numref}`fig-eval-is`. {cite:t}`chatterjee2018sample` show that it needs about $\exp \operatorname{KL}(p(z \mid x) \,\|\, r)$ samples, and that divergence is a sum over dimensions.
#
# The narrow proposal has the right centre and the right shape and is merely too sure of itself. Its weights have infinite variance as soon as its width falls below $1/\sqrt{2} \approx 71\,\%$ of the posterior's, in any number of dimensions: the samples that would carry the estimate are hardly ever drawn. Does the effective sample size say so? In 32 dimensions it does: a handful of 5000 samples is left, and nobody should trust that. But as a measure of *how wrong* the estimate is it fails long before. In eight dimensions some forty effective samples suggest an error of about a quarter of a nat, and it is two to three times as large. In 32 it is seven to eight times the suggestion. The reason is that {eq}`eq-eval-ess` is computed from the samples that were found, and cannot weigh what is missing. Two modes make the plainest case.

# %%
# NBVAL_CHECK_OUTPUT
z = 4.0 + torch.randn(num_samples, generator=stream(4))  # at one of two modes
log_mode = [-0.5 * (z - m).square() for m in (-4.0, 4.0)]
log_target = torch.logaddexp(*log_mode) + math.log(0.5)  # equal modes at -4 and +4
log_weights = log_target - log_mode[1]
print(f"ESS {effective_sample_size(log_weights).item():.0f} of {num_samples}")
error = log_mean_exp(log_weights, 0).item()
print(f"error {error:.3f} nats; log(1/2) = {math.log(0.5):.3f}")

# %% [markdown] tags=["slide"]
# Here the effective sample size is perfect and the error is $\log 2$: half of the mass is absent, and nothing in the sample says so. A low effective sample size proves that an estimate is poor; a high one does not prove that it is good.
#
# ## Annealing
#
# If the prior is too far from the posterior for one jump, go in small steps. Join them by a path of unnormalised densities with inverse temperatures $0 = b_0 < b_1 < \dots < b_T = 1$,
#
# $$
# f_t(z) = p(z)\, p_\theta(x \mid z)^{b_t}, \qquad f_0 = p(z), \qquad f_T = p_\theta(x, z),
# $$ (eq-eval-path)
#
# and let a Markov kernel $\mathcal{T}_t$ that leaves $f_t$ invariant carry each sample along. {cite:t}`neal2001ais` weights the resulting chain $z_0, z_1, \dots$ by
#
# $$
# w = \prod_{t=1}^{T} \frac{f_t(z_{t-1})}{f_{t-1}(z_{t-1})},
# \qquad
# \log w = \sum_{t=1}^{T} (b_t - b_{t-1}) \log p_\theta(x \mid z_{t-1}).
# $$ (eq-eval-weight)
#
# ```{prf:theorem} Annealed importance sampling is unbiased
# :label: thm-eval-unbiased
# If $z_0 \sim p(z)$ and each $z_t \sim \mathcal{T}_t(\cdot \mid z_{t-1})$ with $\mathcal{T}_t$ leaving $f_t$ invariant, then $\mathbb{E}[w] = p_\theta(x)$, for any $T$ and however badly the kernels mix.
# ```
#
# ```{prf:proof}
# Let $\tilde{\mathcal{T}}_t(z \mid z') = \mathcal{T}_t(z' \mid z) f_t(z) / f_t(z')$ be the reversal of the kernel; invariance says exactly that it is normalised in $z$. Run it from the other end: $z_{T-1} \sim f_T / p_\theta(x)$, then $z_{t-1} \sim \tilde{\mathcal{T}}_t(\cdot \mid z_t)$. Divide the joint density of this reverse chain, times $p_\theta(x)$, by that of the forward chain. The kernels cancel except for the factors $f_t(z_{t-1}) / f_t(z_t)$, and what remains is $w$. So $w$ is an importance weight on the space of whole chains, and the expectation of an importance weight is the normalising constant.
# ```
#
# The kernels need to leave $f_t$ invariant. They do not need to converge. Bad mixing costs variance, not bias, and by Jensen $\mathbb{E} \log \frac1K \sum_k w_k \le \log p_\theta(x)$: a **stochastic lower bound**. Markov's inequality makes it sharp in the useful direction, $\Pr(\log \hat p > \log p + c) < e^{-c}$. An estimate that is far too *high* is practically impossible.
#
# Here is the whole algorithm, with Hamiltonian transitions.


# %% tags=["slide"]
def anneal(log_prior, log_likelihood, z, schedule, step_size, generator):
    log_weights, positions = 0.0, [z]
    for before, now in itertools.pairwise(schedule):
        log_weights = log_weights + (now - before) * log_likelihood(z)

        def annealed(z, b=now):
            return log_prior(z) + b * log_likelihood(z)

        state, _ = hmc_step(z, annealed, step_size, 3, generator=generator)
        z = state.z
        positions.append(z)
    return log_weights, torch.stack(positions)


# %% [markdown]
# The library's {py:func}`amortised.ais.ais` does the same with three differences. It carries the likelihood and its gradient from one temperature to the next, so that $L$ leapfrog steps cost exactly $L$ gradients. It accumulates in float64. And it can keep the momentum. On a model with two latents both must be right: the mean weight over many chains equals the evidence.


# %%
def toy_path(dim: int) -> tuple[AnnealedPath, float]:
    """The path to one observation of the independent model, and log p(x)."""
    model, x = independent_model(dim), torch.ones(1, dim, dtype=torch.float64)

    def likelihood_and_grad(z):
        return model.log_likelihood(x, z), (x - z) / noise_scale**2

    prior, log_likelihood = model.prior(), partial(model.log_likelihood, x)
    gradients = log_prob_and_grad(prior), torch.no_grad()(likelihood_and_grad)
    path = AnnealedPath(prior.log_prob, log_likelihood, *gradients)
    return path, model.log_evidence(x).item()


def toy_start(dim: int, offset: int) -> torch.Tensor:
    shape = (num_toy_runs, 1, dim)
    return torch.randn(shape, generator=stream(offset), dtype=torch.float64)


# %%
small, small_truth = toy_path(2)
schedule = linear_schedule(30)
terms = small.log_prior_fn, small.log_likelihood_fn
with torch.no_grad():
    by_hand, _ = anneal(*terms, toy_start(2, 5), schedule, 0.2, stream(6))
annealing = AISSettings(schedule, step_size=0.2, num_leapfrog=3)
library = ais(small, toy_start(2, 7), annealing, generator=stream(8))

# %%
# NBVAL_CHECK_OUTPUT
for name, log_weights in (("ten lines", by_hand), ("library", library.log_weights)):
    ratio = (log_weights[:, 0] - small_truth).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    checks.within_error(ratio.mean(), 1.0, error, label=f"E[w] / p(x), {name}")
    print(f"E[w] / p(x), {name}: {ratio.mean():.2f} ± {error:.2f}")

# %% [markdown] tags=["slide"]
# ## What a chain costs, and what momentum buys
#
# The weight of one chain is off by $\log p(x) - \mathbb{E} \log w$. When the transitions keep up with the path this gap falls as $1/T$: twice as many temperatures, half the gap. What "keeping up" takes is the business of the kernel. Two choices share the name HAIS in the literature, and tables rarely say which one they used.
#
# - **AIS with HMC transitions**: at each temperature draw a fresh momentum and make $L$ leapfrog steps {cite:p}`wu2017decoders`.
# - **HAIS** {cite:p}`sohldickstein2012hais`: one leapfrog step per temperature, and keep most of the momentum: $v \leftarrow a v + \sqrt{1 - a^2}\, n$. If the step is rejected, negate it. The chain then sails through the temperatures and does not start a new random walk at each one.
#
# One routine makes both. We compare them, and plain Langevin steps ($L = 1$, $a = 0$), at equal numbers of gradients, now with 16 latents. The step size matters as much as the kernel, and the best one differs: a trajectory of five steps that is comfortable at 0.2 overshoots at 0.5, where a single step does best. So each kernel first gets a sweep of step sizes at 100 gradients, with random numbers of its own, and is then run at its best.

# %%
kernels = {  # leapfrog steps per temperature, persistence
    "Langevin, L = 1": (1, 0.0),
    "AIS+HMC, L = 3": (3, 0.0),
    "AIS+HMC, L = 5": (5, 0.0),
    "HAIS, L = 1": (1, 0.85),
}
wide, wide_truth = toy_path(16)


def one_chain_gap(budget: int, kernel: tuple, step_size: float, offset: int):
    """Mean of log p(x) - log w over chains with this number of gradients each."""
    leapfrog, persistence = kernel
    spacing = linear_schedule(budget // leapfrog)
    annealing = AISSettings(spacing, step_size, leapfrog, persistence)
    z0, rng = toy_start(16, offset), stream(offset + 1)
    run = ais(wide, z0, annealing, generator=rng, final_transition=False)
    return results.mean_and_se(wide_truth - run.log_weights[:, 0])


# %%
step_sizes = [0.15, 0.2, 0.25, 0.32, 0.4, 0.5, 0.6]
budgets = [50, 100, 200, 400, 800]  # gradients per chain
sweeps, best_step, gap_curves = {}, {}, {}
for name, kernel in kernels.items():
    sweeps[name] = [one_chain_gap(100, kernel, s, 20) for s in step_sizes]
    means = [gap.mean for gap in sweeps[name]]
    best_step[name] = step_sizes[means.index(min(means))]
    best = best_step[name]
    gap_curves[name] = [one_chain_gap(b, kernel, best, 9) for b in budgets]

# %% tags=["hide-input", "slide"] mystnb={"figure": {"name": "fig-eval-momentum", "caption": "Mean gap $\\log p(x) - \\mathbb{E} \\log w$ of one chain. Left: against the step size, at 100 gradients; filled marks are the best step of each kernel. Right: against the number of gradients, each kernel at its best step. Bars are two standard errors; the dotted line has slope $-1$."}, "image": {"alt": "Left, four curves with a minimum each: that of five leapfrog steps at the smallest steps, that of three near 0.3, that of HAIS, the lowest of all, at 0.4, and that of Langevin at 0.5. Right, four falling lines on doubly logarithmic axes that approach slope minus one; HAIS lies lowest throughout, Langevin and three leapfrog steps lie together above it, five leapfrog steps highest."}}
figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.5), sharey=True)
for (name, points), mark in zip(gap_curves.items(), "osDv", strict=True):
    swept, i = [p.mean for p in sweeps[name]], step_sizes.index(best_step[name])
    (line,) = axes[0].plot(step_sizes, swept, marker=mark, mfc="none")
    axes[0].plot(step_sizes[i], swept[i], mark, color=line.get_color())
    mean, se = zip(*[(p.mean, 2 * p.se) for p in points], strict=True)
    axes[1].errorbar(budgets, mean, yerr=se, marker=mark, label=name)
ideal = [0.6 * mean[-1] * 800 / b for b in budgets]
axes[1].plot(budgets, ideal, ":", color=plotting.GREY)
axes[0].set(xlabel="step size", ylabel="gap, nats", yscale="log")
axes[1].set(xlabel="gradients per chain", xscale="log")
axes[1].set_xticks(budgets, labels=budgets)
axes[1].minorticks_off()
axes[1].legend(fontsize="small")
plt.show()

# %% mystnb={"table": {"name": "tab-eval-momentum", "caption": "Kernels at equal numbers of gradients on 16 latents: best step size at 100 gradients, gap of one annealed chain at 800 gradients in nats (mean ± standard error over chains), and slope of the gap's logarithm against that of the gradients."}}
# NBVAL_CHECK_OUTPUT
rows = []
for name, points in gap_curves.items():
    log_gaps = torch.tensor([p.mean for p in points[-3:]]).log()
    slope = (log_gaps[2] - log_gaps[0]).item() / math.log(4)
    rows.append([name, f"{best_step[name]:g}", points[-1], f"{slope:.1f}"])
columns = ["kernel", "best step", "gap at 800 gradients", "slope from 200 to 800"]
results.markdown_table(columns, rows)

# %%
hais_gap, others = gap_curves["HAIS, L = 1"][-1], list(gap_curves.values())[:-1]
assert all(hais_gap.mean + 4 * hais_gap.se < gap[-1].mean for gap in others)

# %% [markdown]
# Carried momentum nearly halves the gap of the best kernel without it. Among those without it, five leapfrog steps are no better than one: they spend their gradients at fewer temperatures. With each kernel at its own best step the gap falls nearly as one over the number of gradients.

# %% [markdown] tags=["slide"]
# ## The schedule
#
# How should the temperatures be spaced? Suppose first that the transitions are perfect. Then each increment is taken at an exact draw from $f_{t-1}$, normalised, and the gap is a sum of divergences between neighbours,
#
# $$
# \log p(x) - \mathbb{E} \log w = \sum_{t=1}^{T} \operatorname{KL}(f_{t-1} \,\|\, f_t)
#   \approx \tfrac12 \sum_{t=1}^{T} (b_t - b_{t-1})^2 \, \operatorname{Var}_{f_{b_t}} \log p_\theta(x \mid z).
# $$ (eq-eval-spacing)
#
# Small steps are needed where the log-likelihood *varies* most: near $b = 0$, where draws from the prior explain the image by anything from bad to terrible. {ref}`ex-eval-perfect` derives this. Towards $b = 1$ it varies least, in the linear model at least, and by this argument fewer temperatures are needed there. The usual sigmoid schedule is dense at both ends all the same {cite:p}`wu2017decoders`. The argument for the other end is that transitions are not perfect: the last densities are the narrowest, so that a chain that has fallen behind needs time there to catch up, and the reverse chains below start there. Whether that is worth half of the temperatures is a question for a measurement, which we make {ref}`on the trained decoder <sec-eval-decoder>`.
#
# ## The sandwich
#
# So far the truth was known. For a real decoder it is not, and a lower bound by itself does not say how low it is. {cite:t}`grosse2015bdmc` turn the chain round. If $z_T$ is an *exact* sample of the posterior, run the same kernels from $b_T$ back to $b_0$. The same theorem, read from the other end, gives $\mathbb{E}[1 / w] = 1 / p_\theta(x)$, hence
#
# $$
# \mathbb{E}\Bigl[\log \tfrac1K \textstyle\sum_k w_k^{\text{forward}}\Bigr]
# \;\le\; \log p_\theta(x) \;\le\;
# \mathbb{E}\Bigl[-\log \tfrac1K \textstyle\sum_k \bigl(w_k^{\text{reverse}}\bigr)^{-1}\Bigr].
# $$ (eq-eval-sandwich)
#
# Exact posterior samples are free for data that the model made itself: draw $z^\star \sim p(z)$, then $x \sim p_\theta(x \mid z^\star)$, and $z^\star$ is one. On the linear model we can see that the truth lies between.

# %%
toy = independent_model(16)
pair_z = torch.randn(200, 16, generator=stream(11), dtype=torch.float64)
pair_noise = torch.randn(200, 16, generator=stream(12), dtype=torch.float64)
pair_x = pair_z + noise_scale * pair_noise
pair_truth = toy.log_evidence(pair_x).detach()


def toy_sandwich(temperatures: int):
    z0 = torch.randn(4, 200, 16, generator=stream(13), dtype=torch.float64)
    path = toy.prior().log_prob, partial(toy.log_likelihood, pair_x)
    annealing = AISSettings(sigmoid_schedule(temperatures), 0.25, num_leapfrog=5)
    bounds = bdmc(path, z0, pair_z, annealing, generator=stream(14))
    lower, upper = bounds.lower - pair_truth, bounds.upper - pair_truth
    return results.mean_and_se(lower), results.mean_and_se(upper)


lengths = [5, 10, 20, 40, 80]
sandwich = [toy_sandwich(t) for t in lengths]

# %% tags=["hide-input", "slide"] mystnb={"figure": {"name": "fig-eval-sandwich", "caption": "Bidirectional Monte Carlo on 200 simulated pairs of the linear model: mean error of the forward (lower) and the reverse (upper) bound, four chains each, with two standard errors. The truth is the line at zero."}, "image": {"alt": "Two curves close in on the zero line from below and from above as the number of temperatures grows."}}
figure, ax = plt.subplots(figsize=(6.0, 3.2))
names, colours = ("lower bound", "upper bound"), ("bound", "approximation")
for side, (name, colour) in enumerate(zip(names, colours, strict=True)):
    points = [pair[side] for pair in sandwich]
    mean, se = [p.mean for p in points], [2 * p.se for p in points]
    colour = plotting.COLOURS[colour]
    ax.errorbar(lengths, mean, yerr=se, marker="o", color=colour, label=name)
exact = plotting.COLOURS["exact"]
ax.axhline(0.0, color=exact, linestyle="--", label="exact log p(x)")
ax.set(xlabel="temperatures T", ylabel="error, nats", xscale="log")
ax.set_xticks(lengths, labels=lengths)
ax.minorticks_off()
ax.legend()
plt.show()

# %% mystnb={"table": {"name": "tab-eval-sandwich", "caption": "Errors of the two sides of the sandwich in nats against the exact $\\log p(x)$, with $T$ temperatures and four chains: mean ± standard error over 200 simulated pairs."}}
# NBVAL_CHECK_OUTPUT
for lower, upper in sandwich:
    assert lower.mean < 4 * lower.se and upper.mean > -4 * upper.se
rows = [[f"{t}", *pair] for t, pair in zip(lengths, sandwich, strict=True)]
columns = ["T", "error of the lower bound", "of the upper bound"]
results.markdown_table(columns, rows)

# %% [markdown] tags=["slide"]
# ## What breaks it: steps that adapt while you measure
#
# {prf:ref}`thm-eval-unbiased` asks that each kernel leave $f_t$ invariant. A kernel whose step size depends on the chain's own past does not: it moves some positions further than others. A program that adapts the step during the very run it reports has no such guarantee, whatever it calls the result. On one latent dimension the effect can be measured. The rule is the usual one, per chain: after an acceptance probability above 0.65 multiply the step by a factor, else divide by it.


# %% tags=["slide"] mystnb={"table": {"name": "tab-eval-adapting", "caption": "Mean of the weights over $p(x)$, which must be one, when each chain multiplies or divides its step by a factor while it anneals; ± is the standard error over chains."}}
def adapting_weights(factor: float, num_chains: int) -> torch.Tensor:
    rng, temperatures, likelihood = stream(15), 20, Normal(2.0, 0.3)
    z = torch.randn(num_chains, 1, generator=rng)
    step_size, log_weights = torch.full_like(z, 0.5), torch.zeros(num_chains)
    for t in range(1, temperatures + 1):
        log_weights += likelihood.log_prob(z[:, 0]) / temperatures

        def annealed(z, b=t / temperatures):
            return -0.5 * z[:, 0].square() + b * likelihood.log_prob(z[:, 0])

        state, info = hmc_step(z, annealed, step_size, 1, generator=rng)
        z, better = state.z, info.acceptance_probability[:, None] > 0.65
        step_size = step_size * torch.where(better, factor, 1.0 / factor)
    return log_weights


log_evidence = Normal(0.0, math.sqrt(1 + 0.3**2)).log_prob(torch.tensor(2.0))
factors = [1.0, 1.02, 1.1, 1.2, 1.5, 2.0]
ratios = []
for factor in factors:
    log_ratio = adapting_weights(factor, 500 * num_toy_runs) - log_evidence
    ratios.append(results.mean_and_se(log_ratio.double().exp()))
rows = [[f"{f:g}", r] for f, r in zip(factors, ratios, strict=True)]
results.markdown_table(["factor (1: frozen)", "E[w] / p(x)"], rows, decimals=3)

# %%
# NBVAL_CHECK_OUTPUT
assert abs(ratios[0].mean - 1) < 4 * ratios[0].se
assert max(r.mean - 4 * r.se for r in ratios) > 1
largest = max(r.mean for r in ratios)
print(f"E[w] / p(x): frozen {ratios[0].mean:.2f}, largest {largest:.1f}")

# %% [markdown]
# An estimate of $p(x)$ that is too high *on average* is no lower bound. A factor of 1.02 is hard to tell from none in the table, and {cite:t}`wu2017decoders` average the acceptance over many chains, which ties a step less closely to any one of them. But no theorem limits the effect. The remedy costs one short run. A *pilot* adapts; its steps are frozen; a new run with new random numbers is reported. {py:func}`amortised.ais.tune_step_size` is the pilot.
#
# (sec-eval-decoder)=
# ## A trained decoder
#
# Now the decoder of this book: 32 latents, three transposed convolutions, trained as a variational auto-encoder for 120 passes. Its weights are in the repository, with a record of how they were made.
#
# First, watch a few chains. The ten lines from above anneal six chains for each of three digits. The decoder draws what each $z_t$ stands for. At $b = 0$ the chains know nothing of the digit. By $b = 0.5$ all but one agree on it; the last, an eight in the place of a one, changes after $b = 0.7$.

# %%
folder = data.data_folder() / "models" / "reference"
decoder, encoder = (
    evaluation.load_module(folder / f"vae-laptop-seed0-{role}.safetensors", device)
    for role in ("decoder", "encoder")
)
for module in (decoder, encoder):
    module.requires_grad_(False)
test = data.load_mnist_binary("test").images.to(device)
drawn = data.drawn_images(len(test), image_seed=2017)  # all, in random order
x_test, x_shown = test[drawn[:num_images]], test[:3]

# %%
start = torch.randn(6, 3, 32, generator=stream(16)).to(device)
betas = sigmoid_schedule(40)
frames = [0, 4, 8, 12, 16, 20, 24, 32, 40]
with torch.no_grad():
    _, path = anneal(
        decoder.prior().log_prob,
        partial(decoder.log_likelihood, x_shown),
        start,
        betas,
        0.08,
        stream(17) if device == "cpu" else None,
    )
    shown = decoder.likelihood(path[frames]).mean.cpu()


# %% tags=["hide-input", "slide"] mystnb={"figure": {"name": "fig-eval-annealing", "caption": "Annealing. In each frame: left, three observed test digits; right, what six chains for each believe at the inverse temperature above the frame."}, "image": {"alt": "An animation: six columns of unrelated digits turn into six near copies of the observed digit at the left of each of three rows."}}
def draw(figure, frame):
    ax = figure.subplots()
    blank, chains = torch.zeros(3, 1, 784), shown[frame].transpose(0, 1)
    row = torch.cat([x_shown[:, None].cpu(), blank, chains], dim=1)
    plotting.show_digits(row.reshape(-1, 784), ncols=8, ax=ax)
    ax.set_title(f"b = {betas[frames[frame]].item():.3f}")


alt = "Chains turn from unrelated digits into the observed ones."
looks = dict(size=(4.6, 2.0), fps=2.5, num_colours=32, alt=alt)
plotting.animate(draw, len(frames), **looks)

# %% [markdown]
# Then numbers. First the question about schedules: HAIS with a fifth of its usual temperatures, spaced in four ways. All four are lower bounds on average for the same images, so a *higher* value is a better one, and we compare in pairs.


# %%
def first_half(num_temperatures: int) -> torch.Tensor:
    """The half of the sigmoid schedule that is dense at b = 0, stretched."""
    half = sigmoid_schedule(2 * num_temperatures)[: num_temperatures + 1]
    return half / half[-1]


def fourth_power(num_temperatures: int) -> torch.Tensor:
    return linear_schedule(num_temperatures) ** 4


settings = dict(num_chains=num_chains, pilot_chains=2, seed=seed)
hais = dict(num_leapfrog=1, persistence=0.9)
spacings = {"sigmoid": sigmoid_schedule, "linear": linear_schedule}
spacings |= {"first half of it": first_half, "fourth power": fourth_power}
by_spacing = {}
for name, spacing in spacings.items():
    short = dict(num_temperatures=num_temperatures // 5, schedule_fn=spacing)
    estimate = evaluation.hais_ll(decoder, x_test, **short, **hais, **settings)
    by_spacing[name] = estimate.log_likelihood


# %% mystnb={"table": {"name": "tab-eval-schedules", "caption": "Annealed lower bound with temperatures spaced in three other ways, minus that with the sigmoid schedule, in nats: mean ± standard error of the paired differences over images. Higher is better."}}
# NBVAL_CHECK_OUTPUT
def spaced(name: str) -> results.Estimate:
    return results.paired_difference(by_spacing[name], by_spacing["sigmoid"])


rows = [[name, spaced(name)] for name in list(spacings)[1:]]
columns = ["schedule", "minus sigmoid, nats in pairs"]
results.markdown_table(columns, rows, decimals=1)

# %% [markdown] tags=["slide"]
# Without density at $b = 0$ the linear schedule loses some 25 nats at this length, with a 95 % interval from 7 to 42 over these twelve images, as {eq}`eq-eval-spacing` leads one to expect. Density at $b = 1$ is not seen to help: the two schedules without it are level with the sigmoid or better, within the errors that these images leave. So the lag of imperfect transitions is no reason to spend half of the temperatures at the end, for this decoder and these kernels. We keep the sigmoid below because it is what other tables use; for a decoder of your own, try both.
#
# ### Which images?
#
# A mean over test images has a standard error over images, and it is large: log-likelihoods of digits differ by twenty nats and more. Worse, the first hundred test images, a natural choice where evaluation is expensive, are easy ones. A *control variate* repairs both. Let $c_i$ be a cheap value that predicts the expensive one and can be had for all $N$ images: here a bound by importance sampling from the encoder with two samples. With expensive values $y_i$ for $n$ random images,
#
# $$
# \hat y = \bar y + \beta \, \Bigl( \frac1N \sum_{i=1}^{N} c_i - \bar c \Bigr),
# $$ (eq-eval-control)
#
# where $\beta$ is the least-squares slope of $y$ on $c$. If the random images happened to be easy, $\bar c$ shows it and the second term takes it back. What remains of the variance is that of the residuals. The expensive values are on record for this decoder and 100 random images: HAIS with 8 chains, 500 temperatures and $a = 0.9$.

# %%
likelihood = partial(log_likelihood_and_grad, decoder)
bound = partial(evaluation.importance_sampling_ll, decoder, encoder)
settings = dict(num_samples=2, seed=seed, likelihood=likelihood)
control = bound(test[drawn[:num_control]], **settings).log_likelihood
path = data.data_folder() / "results/many_teachers/vae-laptop-seed0.json"
recorded = results.load_result(path).per_image
recorded_hais = recorded["start_hais_ll"].double()
certified = recorded["simulated_gap"]  # of the decoder after 600 more updates
few = torch.arange(len(recorded_hais))  # the first ones in random order
mean = evaluation.regression_mean(recorded_hais, few, control)

# %% mystnb={"table": {"name": "tab-eval-control", "caption": "Estimates of the mean over all test images, in nats: of the two-sample bound, and of $\\log p(x)$ by HAIS without and with the control variate. ± is the standard error over images; the row without one has seen all images that it names."}}
# NBVAL_CHECK_OUTPUT
first = bound(test[:100], **settings).log_likelihood
rows = [
    ["two-sample bound, the first 100 images", results.mean_and_se(first)],
    ["two-sample bound, 100 random images", results.mean_and_se(control[few])],
    [f"two-sample bound, {num_control} images", f"{control.mean().item():.1f}"],
    ["HAIS, 100 random images", results.mean_and_se(recorded_hais)],
    ["HAIS, 100 random images and control variate", mean],
    ["gap of the sandwich, 20 simulated pairs", results.mean_and_se(certified)],
]
results.markdown_table(["estimate", "mean, nats"], rows, decimals=1)

# %% tags=["hide-input", "slide"] mystnb={"figure": {"name": "fig-eval-control", "caption": "The control variate on 100 random test images: recorded HAIS against the two-sample bound, with the least-squares line. The triangle below marks the bound's mean over these images, the vertical line its mean over all 10,000."}, "image": {"alt": "A scatter of one hundred points close to a rising straight line, from about minus 170 to minus 30 on both axes; the few lowest points lie above the line. The triangle at the bottom lies on the vertical line near minus 89."}}
figure, ax = plt.subplots(figsize=(5.2, 3.4))
c, y = control[few], recorded_hais
ax.plot(c, y, "o", markersize=4, color=plotting.COLOURS["bound"])
slope = torch.cov(torch.stack([c, y]))[0, 1] / c.var()
ends = torch.stack([c.min(), c.max()])
ax.plot(ends, y.mean() + slope * (ends - c.mean()), color=plotting.GREY)
floor = recorded_hais.min().item() - 6
ax.plot(c.mean(), floor, "^", color=plotting.COLOURS["approximation"])
ax.axvline(control.mean().item(), color=plotting.COLOURS["exact"], linestyle="--")
ax.set(xlabel="two-sample bound, nats", ylabel="HAIS, nats")
plt.show()

# %% [markdown] tags=["slide"]
# The first hundred images are nearly three nats easier than the test set. Beside a published mean over 10,000 images, a mean over them alone would flatter any decoder. The control variate leaves about a sixth of the standard error, so that 100 expensive images do the work of thousands: the bound predicts most of what makes one digit's value differ from another's ({numref}`fig-eval-control`). It removes the error of *which images* were drawn, not that of the estimates themselves: beside a sandwich that is open by 1.7 nats the error over images is the smaller one, and the true mean may lie up to that much higher. {py:func}`amortised.evaluation.regression_mean` is the estimator.
#
# (sec-eval-correlated)=
# ## Not non-Gaussian: correlated
#
# How low is importance sampling for a real decoder, and why? Take two decoders of equal shape and equal length of training. One was trained as a variational auto-encoder, with a mean-field encoder. The other was trained by Langevin chains of 50 steps from the prior, without any encoder (chapter 5). A mean-field proposal fits the first tolerably and misses ten nats of the second. It is tempting to say that the second has posteriors "far from Gaussian". Test it: a Gaussian can fail in two ways, and they have different cures.
#
# - Its *family* may be too small among Gaussians: a diagonal covariance cannot follow correlations. The cure is a full covariance.
# - The posterior may have skewness, heavy tails or several modes. No Gaussian follows these; the cure is annealing.
#
# So fit both kinds to each image, with equal effort, and measure how far each bound stays below $\log p(x)$. By {eq}`eq-eval-meanfield` a Gaussian posterior of precision $\Lambda$ leaves $\tfrac12 (\sum_j \log \Lambda_{jj} - \log \det \Lambda)$ to the mean-field bound. {py:func}`amortised.evaluation.fit_full_covariance` ascends each image's own ELBO by natural gradients; no encoder is involved, so no amortisation error is either.


# %%
@torch.no_grad()
def log_weights_from(model, r, x, num_draws=512):
    """Log-weights of draws from the proposals r(z | x): their mean is the bound."""
    q, likelihood = r(x), log_likelihood_and_grad(model, x)
    with torch.random.fork_rng():
        torch.manual_seed(1000 * seed + 21)
        z = q.sample((num_draws,))
    log_joint = model.prior().log_prob(z) + likelihood.log_likelihood(z)
    return (log_joint - q.log_prob(z)).double().cpu()


def fit_both(model, x):
    """Log-weights of per-image Gaussians of both kinds, and the covariances."""
    found = {}
    for name in ("mean field", "full covariance"):
        diagonal = name == "mean field"
        r = evaluation.fit_full_covariance(model, x, diagonal=diagonal, seed=seed)
        found[name] = log_weights_from(model, r, x)
    scale = r.scale_tril[:, 0].double()  # of the first start of the full covariance
    return found, scale @ scale.mT


# %%
files = {"variational auto-encoder": "vae", "50-step chains": "persistent_t50"}
models, fits, covariances = {}, {}, {}
for name, row in files.items():
    file = folder.parent / "amc_table1" / f"{row}-laptop-seed0-decoder.safetensors"
    models[name] = evaluation.load_module(file, device).requires_grad_(False)
    fits[name], covariances[name] = fit_both(models[name], x_test)

# %% [markdown]
# The mean of the log-weights estimates the ELBO, and importance sampling with 512 draws from the full covariance stands for $\log p(x)$; further below it is held against annealing. Each proposal is the mixture of fits from three starts, which misses fewer modes than one.


# %%
def implied_gap(covariance):
    precision = torch.linalg.inv(covariance)
    log_diagonal = precision.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * (log_diagonal - torch.logdet(precision))


def turned_gap(covariance, num_turns=50):
    """The implied gap after a random rotation of all axes, mean over rotations."""
    normal = torch.randn(num_turns, 1, 32, 32, generator=stream(22))
    turns = torch.linalg.qr(normal.to(covariance)).Q
    return implied_gap(turns @ covariance @ turns.mT).mean(0)


# %% mystnb={"table": {"name": "tab-eval-gaps", "caption": "For two decoders, in nats: gap of the mean-field bound, measured and as the fitted covariance implies it, gap of the bound with full covariance, by how much importance sampling differs between the two proposals, and the gap by the formula after one random rotation of all latents, mean of 50. Mean ± standard error over test images."}}
# NBVAL_CHECK_OUTPUT
shortfall, rows = {}, []
for name, fit in fits.items():
    narrow, full = fit["mean field"], fit["full covariance"]
    truth = log_mean_exp(full, dim=0)
    shortfall[name] = truth - narrow.mean(0)
    gaps = [shortfall[name], implied_gap(covariances[name]), truth - full.mean(0)]
    gaps.append(log_mean_exp(narrow, dim=0) - truth)
    gaps.append(turned_gap(covariances[name]))
    rows.append([name, *map(results.mean_and_se, gaps)])
columns = ["decoder", "mean-field gap", "by the formula", "full-covariance gap"]
columns += ["IS, mean field minus full", "axes turned at random"]
results.markdown_table(columns, rows, decimals=1)

# %% tags=["hide-input", "slide"] mystnb={"figure": {"name": "fig-eval-correlated", "caption": "Left and middle: absolute correlations of the 32 latents under the fitted posterior, averaged over test images, for the two decoders; the diagonal is left out. Right: the mean-field gap of each image, measured, against the gap that its fitted covariance implies; on the dashed line the covariance explains the whole gap."}, "image": {"alt": "Two square heat maps with one colour scale: that of the variational auto-encoder is pale apart from three pairs of dark cells, all among the same three latents, that of the chain-trained decoder is filled with values up to 0.4. Right, a scatter: the points of the auto-encoder lie between two and six nats, those of the chain-trained decoder between twelve and 26, both along the dashed diagonal and up to a few nats above it."}}
figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.9))
for ax, (name, covariance) in zip(axes, covariances.items(), strict=False):
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    correlation = (covariance / sd[:, :, None] / sd[:, None, :]).abs().mean(0)
    correlation = correlation.fill_diagonal_(0.0)
    image = ax.imshow(correlation, cmap="Blues", vmin=0, vmax=0.4)
    ax.set_title(name, fontsize="medium")
    ax.set(xticks=[], yticks=[], xlabel="latent")
    implied, measured = implied_gap(covariance), shortfall[name]
    axes[2].plot(implied, measured, "o", markersize=4, label=name)
figure.colorbar(image, ax=list(axes[:2]), shrink=0.8, label="|correlation|")
low, high = axes[2].get_xlim()
axes[2].plot([low, high], [low, high], "--", color=plotting.GREY)
axes[2].set(xlabel="implied gap, nats", ylabel="measured gap, nats")
axes[2].legend(fontsize="small")
plt.show()

# %% [markdown] tags=["slide"]
# The posteriors of the chain-trained decoder are **correlated, and otherwise nearly Gaussian**. The mean-field bound misses nearly twenty nats, the formula accounts for almost all of them, and the full-covariance bound is within about a nat of $\log p(x)$, a gap that a few hundred importance samples close. The variational auto-encoder was trained *through* a mean-field bound: the bound rewards a decoder whose axes lie where its encoder can follow, as model B's did at the beginning of this chapter, and {numref}`fig-eval-correlated` shows the result. Chains follow correlations, so a decoder trained by them has no reason to align its axes.
#
# The control is the last column. One random rotation of all latents leaves $\log p_\theta(x)$ as it is, since the prior is round. It costs the auto-encoder nine nats and the other decoder nothing: the first had aligned its axes, the second had not. The six nats that still lie between the two are not a matter of axes.
#
# ### Held against annealing
#
# Is the full covariance really enough? A proposal could miss modes, quietly. Annealing starts from the prior and does not depend on any fit, so it is the independent check; and the sandwich, on pairs that the decoder simulates, says how low annealing itself may be. We certify two settings at equal numbers of gradients on the harder decoder.

# %%
hard = models["50-step chains"]
settings = dict(num_chains=num_chains, pilot_chains=2, seed=seed)
hais["num_temperatures"] = num_temperatures
hmc = dict(num_leapfrog=num_leapfrog)
hmc["num_temperatures"] = num_temperatures // num_leapfrog
variants = {f"AIS+HMC, L = {num_leapfrog}": hmc, "HAIS, a = 0.9": hais}
certificates = {
    name: evaluation.bdmc_ll(hard, num_pairs, **variant, **settings)
    for name, variant in variants.items()
}
annealed = evaluation.hais_ll(hard, x_test, **hais, **settings)

# %% tags=["hide-input", "slide"] mystnb={"figure": {"name": "fig-eval-bdmc", "caption": "Upper minus lower bound on $\\log p(x)$ for digits that the chain-trained decoder generated itself, one mark for each digit and estimator, and the means with two standard errors on the right. Below the dotted line bounds have crossed, which noise allows in single pairs."}, "image": {"alt": "For each simulated digit two marks. The gaps of AIS with fresh momentum lie between two and nine nats, those of HAIS between minus two and three. On the right two means with bars, near five nats and near one."}}
figure, ax = plt.subplots(figsize=(6.8, 3.0))
for i, (name, certificate) in enumerate(certificates.items()):
    place, mark = torch.arange(num_pairs) + 0.25 * i, "os"[i]
    (line,) = ax.plot(place, certificate.gap, mark, markersize=5, label=name)
    gap, looks = certificate.expected_gap, dict(fmt=mark, color=line.get_color())
    ax.errorbar(num_pairs + 1 + i, gap.mean, yerr=2 * gap.se, capsize=4, **looks)
ax.axhline(0.0, color=plotting.GREY, linestyle=":")
ax.set(xlabel="simulated pair", ylabel="upper − lower, nats")
ax.set_xticks([0, num_pairs - 1, num_pairs + 1.5], labels=[1, num_pairs, "means"])
ax.legend(fontsize="small")
plt.show()

# %% tags=["slide"] mystnb={"table": {"name": "tab-eval-annealed", "caption": "The check by annealing for the chain-trained decoder. Gaps are those of the sandwich in nats, mean ± standard error over simulated pairs; the difference below them is paired over these pairs, the next one over test images. ESS is the mean effective sample size, of the samples named."}}
# NBVAL_CHECK_OUTPUT
full = fits["50-step chains"]["full covariance"]
rows = [[f"gap, {name}", c.expected_gap] for name, c in certificates.items()]
gaps = [certificate.gap for certificate in certificates.values()]
rows.append(["AIS+HMC minus HAIS, same pairs", results.paired_difference(*gaps)])
pair = log_mean_exp(full, dim=0), annealed.log_likelihood
difference = results.paired_difference(*pair)
rows.append(["full covariance minus HAIS, in pairs", difference])
for name, ess in (
    ("full covariance, of 512", effective_sample_size(full)),
    (f"HAIS, of {num_chains}", annealed.ess),
):
    rows.append([f"ESS, {name}", f"{ess.mean():.1f}"])
results.markdown_table(["quantity", "value"], rows, decimals=1)

# %% [markdown] tags=["slide"]
# What a certificate says: *for images that the model generates, estimates at these settings are off by less than the gap, on average*. What it does not: real digits are not samples of the model, and their posteriors may be harder. Here the two agree as far as twelve images can tell: with 95 % confidence the full covariance lies between 0.6 nats below and 1.2 above HAIS on average. A mode that is missed in one image of a hundred would not show. The cost was about equal: 1500 gradients and 512 likelihoods for each image against 2000 gradients and a pilot. The effective sample sizes are not on one scale: each is out of its own number of samples.
#
# (sec-eval-results)=
# ## Published and own results
#
# {cite:t}`li2017amc` evaluated ten ways to train one small decoder twice: by importance sampling with $K = 5000$ and by annealing with $K = 100$. The ten rows are a study of this book too; chapter 5 says what they are. Here we only ask how well they were *measured*. Published values are means over the 10,000 test images, recorded ones over the first 100, which are easier; and trainings differ in length. So compare within a column.

# %% tags=["slide"] mystnb={"table": {"name": "tab-eval-table1", "caption": "Annealed $\\log p(x)$ in nats: published, all 10,000 test images; recorded at laptop scale, the first 100, mean ± standard error over images, and in parentheses half the width of the 95 % t-interval over seeds."}}
# NBVAL_CHECK_OUTPUT
published = {}
for metric in ("IS-LL", "HAIS-LL"):
    entries = results.load_published("amc", table="Table 1", metric=metric)
    published[metric] = {entry["row"]: entry for entry in entries}
row_names = (
    "vae mcmc_vi_t5 amc_gaussian_t5 amc_cnn_g_t5 amc_cnn_g_t50 avb_cnn_g "
    "amc_cnn_b_t5 amc_cnn_b_t50 avb_cnn_b persistent_t50"
).split()
study = dict(zip(row_names, published["HAIS-LL"], strict=True))
labels = {row: name.replace(" |", ",") for row, name in study.items()}
by_hais = published["HAIS-LL"]
printed = {row: by_hais[name]["printed"] for row, name in study.items()}
scales = ["laptop"]
tables.study_table("amc_table1", labels, "ais_ll", printed, scales, decimals=1)

# %% [markdown]
# Each recorded mean has two errors: one over images, and a 95 % interval over three trainings, which uses Student's multiplier of 4.30 because a spread from three values is itself uncertain. The recorded column is AIS+HMC with 100 temperatures and $L = 5$; the source says HAIS and does not say which.
#
# The next table subtracts. How much does annealing find that importance sampling has missed? The proposal is of one kind for every row, a mean-field Gaussian encoder fitted to the finished decoder, and the differences are taken in pairs. The last column is the certificate: the gap of the sandwich on digits that the decoder itself generated.

# %% mystnb={"table": {"name": "tab-eval-missed", "caption": "What annealing finds beyond importance sampling, in nats: published values subtracted, and recorded ones paired over images; and the certificate, the gap of the sandwich on simulated digits in nats. Mean ± standard error over images or pairs, and in parentheses half the width of the 95 % t-interval over seeds."}}
# NBVAL_CHECK_OUTPUT
recorded = tables.load_study("amc_table1", "laptop")
missed, rows = {"published": {}, "laptop": {}}, []
for row, name in study.items():
    by_is = published["IS-LL"][name]["value"]
    missed["published"][row] = by_hais[name]["value"] - by_is
    runs = [run.per_image for run in recorded[row]]
    pooled = tables.pool([run["ais_ll"] - run["posthoc_is_ll"] for run in runs])
    missed["laptop"][row] = pooled.mean
    gap = tables.pool([values["simulated_gap"] for values in runs]).text(1)
    rows.append([labels[row], missed["published"][row], pooled.text(1), gap])
columns = ["row", "annealed minus IS, published", "in pairs, laptop"]
display(results.markdown_table([*columns, "certificate, laptop"], rows))
worst = [set(sorted(values, key=values.get)[-5:]) for values in missed.values()]
print("the same five rows lose most by importance sampling:", worst[0] == worst[1])

# %% [markdown]
# The pattern of the source returns, with other trainings and another proposal: the variational auto-encoder and the rows with $T = 5$ lose little by importance sampling; the rows with $T = 50$, both rows of adversarial variational Bayes (AVB) and the row without an encoder lose most. {ref}`The section above <sec-eval-correlated>` says what is lost: for the one of these decoders that it examines, the correlations of the posterior, not its shape.
#
# The certificates say how far to trust the annealed column. At this short schedule it is worst for the decoders with the sharpest posteriors, so their values are too low by more: differences larger than the certificates stand, smaller ones need longer chains, carried momentum or the full covariance.

# %% [markdown] tags=["slide"]
# ## Evaluate your own decoder
#
# Any class will do that has `latent_dim`, `observation_dim`, `prior()` and `likelihood(z)`; {doc}`/adding` lists what each must return. Start with the full covariance, which is cheap; certify annealing; and report both:

# %% tags=["slide"]
torch.manual_seed(seed)
network = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 784))  # yours
mine = BernoulliDecoder(network, latent_dim=2, observation_dim=784)
short, x_mine = dict(num_chains=8, num_temperatures=30, seed=seed), x_test.cpu()
estimate = evaluation.hais_ll(mine, x_mine, **short)
bound = evaluation.bdmc_ll(mine, num_pairs, **short).expected_gap
fitted = evaluation.fit_full_covariance(mine, x_mine)
quick = evaluation.importance_sampling_ll(mine, fitted, x_mine, num_samples=512)
pair = quick.log_likelihood, estimate.log_likelihood
difference = results.paired_difference(*pair)

# %%
# NBVAL_CHECK_OUTPUT
print(f"log p(x) = {estimate.summary.mean:.1f} nats (untrained)")
print(f"certified to {bound.mean:.1f} ± {bound.se:.1f} nats on its own samples")
print(f"full covariance minus annealing: {difference.mean:.1f} nats")

# %% [markdown] tags=["slide"]
# A long evaluation can be stopped at any moment. Say where its finished blocks of 100 images are to be kept, and the same lines go on where they were:
#
# ```python
# from pathlib import Path
# from amortised.files import Work
#
# decoder = evaluation.load_module("mine/decoder.safetensors")
# evaluation.hais_ll(decoder, images, work=Work(Path("mine"), "annealing"))
# ```
#
# ## Summary
#
# - A bound ranks *pairs* of model and approximation: we built two models that it ranks wrongly.
# - Importance sampling fails with dimension. A low effective sample size says that it has failed; its size understates the error, and it cannot see what was not sampled.
# - Annealed importance sampling is importance sampling on whole chains. It is unbiased at any length, and its gap falls as one over the number of temperatures. Carried momentum buys a smaller gap for the same gradients; a table should say which variant it used.
# - Reverse chains from exact posterior samples give an upper bound. The sandwich certifies settings on simulated data, and no more.
# - Step sizes are tuned in a pilot and frozen. A run that adapts while it measures can overestimate.
# - The decoder examined here that was trained without a mean-field encoder has posteriors that are correlated more than non-Gaussian. A Gaussian of full covariance for each image, with a few hundred importance samples, agrees with annealing there.
# - A cheap bound on all test images turns values on a hundred random ones into a mean over the test set.
#
# ## Exercises
#
# Each statement says what it asks you to do, how many points its code and its text are worth, and about how long it takes. It ends with a check. Write your answer into a cell of its own, then run the check under it: it prints a tick, or says what is wrong and gives a hint.
#
# ```{exercise} The gap of perfect transitions
# :label: ex-eval-perfect
#
# *Derive · 3 + 3 points · 35 minutes.*
#
# Show the first equality of {eq}`eq-eval-spacing`. Then take one latent with $z \sim \mathcal{N}(0, 1)$, $x \mid z \sim \mathcal{N}(z, \sigma^2)$, $x = 1$ and $\sigma$ = `noise_scale`, and write `perfect_gap(schedule)`, the gap in nats of chains whose transitions are exact draws. No sampling is needed.
#
# ~~~python
# def simulated_gap(schedule, num_chains=200_000):
#     log_weights = -small_log_evidence
#     for before, now in itertools.pairwise(schedule.tolist()):
#         precision = 1 + before / noise_scale**2
#         noise = torch.randn(num_chains, generator=stream(31))
#         z = before / noise_scale**2 / precision + noise / precision**0.5
#         increment = (now - before) * Normal(z, noise_scale).log_prob(torch.ones(()))
#         log_weights = log_weights + increment
#     return -log_weights.mean().item()
#
#
# variance = torch.tensor(1 + noise_scale**2)
# small_log_evidence = Normal(0.0, variance.sqrt()).log_prob(torch.ones(())).item()
# hint = "which of two neighbours is the draw from? that density comes first"
# for spacing in (linear_schedule(10), linear_schedule(10) ** 4):
#     yours, expected = perfect_gap(spacing), simulated_gap(spacing)
#     checks.close(yours, expected, rtol=0.03, label="the gap", hint=hint)
# ~~~
# ```

# %% [markdown] nbgrader={"grade": true, "solution": true, "points": 3}
# ```{solution-start} ex-eval-perfect
# :label: sol-eval-perfect
# :class: dropdown
# ```
#
# Let $\pi_t = f_t / Z_t$ with $Z_0 = 1$, $Z_T = p_\theta(x)$. An increment at an exact draw from $\pi_{t-1}$ has mean $\mathbb{E}_{\pi_{t-1}} \log (f_t / f_{t-1}) = \log (Z_t / Z_{t-1}) - \operatorname{KL}(\pi_{t-1} \,\|\, \pi_t)$, and the logarithms telescope. Here $\pi_t$ is normal with precision $\lambda_t = 1 + b_t / \sigma^2$ and mean $(b_t / \sigma^2)\, x / \lambda_t$.


# %% nbgrader={"solution": true, "points": 3}
def perfect_gap(schedule):
    precision = 1 + schedule / noise_scale**2
    mean = schedule / noise_scale**2 / precision
    ratio = precision[1:] / precision[:-1]
    distance = precision[1:] * mean.diff().square()
    return 0.5 * (ratio - 1 - ratio.log() + distance).sum().item()


# %%
# NBVAL_CHECK_OUTPUT
for power in (1, 2, 4):
    gap = perfect_gap(linear_schedule(10) ** power)
    print(f"b = (t / 10)^{power}: gap of perfect transitions {gap:.2f} nats")

# %% [markdown]
# With the same ten temperatures the square leaves half of the gap. The fourth power overdoes it, and leaves two thirds.
#
# ```{solution-end}
# ```
#
# ```{exercise} The reverse chain
# :label: ex-eval-reverse
#
# *Build · 4 + 2 points · 35 minutes.*
#
# Write `reverse_anneal(log_prior, log_likelihood, z, schedule, step_size, generator)`, the upper half of the sandwich, in the style of the ten lines of this chapter: z holds exact draws from the posterior, and the log-weight has the sign of the forward one, so that $\mathbb{E}[1/w] = 1 / p_\theta(x)$.
#
# ~~~python
# posterior = independent_model(2).posterior(torch.ones(1, 2).double())
# with torch.random.fork_rng():
#     torch.manual_seed(33)
#     exact_z = posterior.sample((20_000,))
# with torch.no_grad():
#     rest = exact_z, linear_schedule(30), 0.1, stream(34)
#     reversed_weights = reverse_anneal(*terms, *rest)
# inverse = (small_truth - reversed_weights[:, 0]).exp()
# error = inverse.std() / len(inverse) ** 0.5
# hint = "between two increments the chain must move under the lower temperature"
# checks.within_error(inverse.mean(), 1.0, error, label="p(x) E[1/w]", hint=hint)
# ~~~
# ```

# %% [markdown] nbgrader={"grade": true, "solution": true, "points": 2}
# ```{solution-start} ex-eval-reverse
# :label: sol-eval-reverse
# :class: dropdown
# ```
#
# Read the proof of {prf:ref}`thm-eval-unbiased` from the other end: $z_{T-1} \sim \pi_T$ is the posterior draw itself, so the first increment needs no move; then each move leaves the density invariant at whose temperature the next increment ends.


# %% nbgrader={"solution": true, "points": 4}
def reverse_anneal(log_prior, log_likelihood, z, schedule, step_size, generator):
    log_weights, backwards = 0.0, schedule.flip(0)
    for now, before in itertools.pairwise(backwards):
        log_weights = log_weights + (now - before) * log_likelihood(z)

        def annealed(z, b=before):
            return log_prior(z) + b * log_likelihood(z)

        z = hmc_step(z, annealed, step_size, 3, generator=generator)[0].z
    return log_weights


# %%
# NBVAL_CHECK_OUTPUT
posterior = independent_model(2).posterior(torch.ones(1, 2).double())
with torch.random.fork_rng():
    torch.manual_seed(33)
    exact_z = posterior.sample((20_000,))
with torch.no_grad():
    rest = exact_z, linear_schedule(30), 0.1, stream(34)
    inverse = (small_truth - reverse_anneal(*terms, *rest)[:, 0]).exp()
found = results.mean_and_se(inverse)
print(f"p(x) E[1/w] = {found.mean:.2f} ± {found.se:.2f}")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Two bounds that agree on nonsense
# :label: ex-eval-nonsense
#
# *Diagnose · 3 + 3 points · 30 minutes.*
#
# A colleague certifies a decoder whose likelihood carries a factor left over from training. The sandwich is tight, so the number must be right:
#
# ~~~python
# def their_likelihood(z):
#     return 0.95 * small.log_likelihood_fn(z)
#
#
# precision = 1 + 0.95 / noise_scale**2
# exact = 1 - 1 / precision + torch.randn(1, 2, generator=stream(36)) / precision**0.5
# settings = AISSettings(linear_schedule(400), 0.2, num_leapfrog=3)
# theirs = small.log_prior_fn, their_likelihood
# z, exact, noise = toy_start(2, 35), exact.double(), stream(37)
# both = bdmc(theirs, z, exact, settings, generator=noise)
# print(f"lower {both.lower.item():.2f}, upper {both.upper.item():.2f}")
# print(f"log p(x) {small_truth:.2f}")
# ~~~
#
# What do both bounds enclose? Derive it for one observation of the independent model, all entries of $x$ being 1, and write `enclosed(power, dim)` in nats, where `power` is the factor.
#
# ~~~python
# hint = "integrate it; a power of a normal density is no normalised density"
# for power, dim in ((0.95, 2), (0.5, 2), (1.0, 3)):
#     grid = torch.linspace(-9, 9, 20_001).double()
#     log_f = Normal(0.0, 1.0).log_prob(grid)
#     log_f = log_f + power * Normal(grid, noise_scale).log_prob(torch.ones(()))
#     area = torch.trapezoid(log_f.exp(), grid).log().item()
#     yours = enclosed(power, dim)
#     checks.close(yours, dim * area, rtol=1e-4, label="enclosed", hint=hint)
# ~~~
# ```

# %% [markdown] nbgrader={"grade": true, "solution": true, "points": 3}
# ```{solution-start} ex-eval-nonsense
# :label: sol-eval-nonsense
# :class: dropdown
# ```
#
# With the factor $b = 0.95$ the path ends at $p(z)\, p_\theta(x \mid z)^b$. Both bounds then enclose $\log \int p(z)\, p_\theta(x \mid z)^{b} dz$, and the tighter the sandwich, the more certain the wrong number: agreement shows that two runs estimate *one* quantity, not which. Since $p(x \mid z)^b = (2\pi\sigma^2)^{-b/2} (2\pi\sigma^2/b)^{1/2}\, \mathcal{N}(x; z, \sigma^2/b)$, the integral is that factor times $\mathcal{N}(x; 0, 1 + \sigma^2/b)$. A model whose evidence is known, such as this one, finds the mistake; a certificate alone cannot.


# %% nbgrader={"solution": true, "points": 3}
def enclosed(power, dim):
    variance = noise_scale**2
    log_factor = 0.5 * (1 - power) * math.log(2 * math.pi * variance)
    log_factor -= 0.5 * math.log(power)
    marginal = Normal(0.0, math.sqrt(1 + variance / power))
    return dim * (log_factor + marginal.log_prob(torch.tensor(1.0)).item())


# %%
# NBVAL_CHECK_OUTPUT
print(f"enclosed {enclosed(0.95, 2):.2f}, log p(x) {small_truth:.2f}")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Thermodynamic integration
# :label: ex-eval-thermo
#
# *Derive · 3 + 3 points · 35 minutes.*
#
# Differentiate $\log \int f_b(z)\, dz$ in $b$ and show that $\log p_\theta(x) = \int_0^1 \mathbb{E}_{f_b}[\log p_\theta(x \mid z)]\, db$. For the independent model with all entries of $x$ equal to 1, write `expected_log_likelihood(b, dim)` in closed form, for a tensor of inverse temperatures. Is the trapezoidal estimate from a chain's averages a bound?
#
# ~~~python
# b = linear_schedule(4000)
# hint = "log p(x|z) is quadratic in z: it needs the variance of z under f_b"
# for dim in (1, 2):
#     integral = torch.trapezoid(expected_log_likelihood(b, dim), b)
#     truth = toy_path(dim)[1]
#     checks.close(integral, truth, rtol=1e-3, label="the integral", hint=hint)
# ~~~
# ```

# %% [markdown] nbgrader={"grade": true, "solution": true, "points": 3}
# ```{solution-start} ex-eval-thermo
# :label: sol-eval-thermo
# :class: dropdown
# ```
#
# $\frac{d}{db} \log \int f_b = \int \log p_\theta(x \mid z) f_b / \int f_b = \mathbb{E}_{f_b} \log p_\theta(x \mid z)$, and the two ends are $\log 1$ and $\log p_\theta(x)$. Under $f_b$ each $z$ is normal with precision $\lambda = 1 + b/\sigma^2$, and $x - z$ has mean $x / \lambda$.
#
# The estimate is no bound. Chains that lag behind the temperature make the integrand too small, and the trapezoidal rule errs with the sign of the curvature; the two need not add up to an error of known sign. The sum {eq}`eq-eval-weight` is the same integral by the left-hand rule, *chain by chain and inside the exponential*, and that is what makes it one.


# %% nbgrader={"solution": true, "points": 3}
def expected_log_likelihood(b, dim):
    variance = noise_scale**2
    precision = 1 + b / variance
    mean_square = 1 / precision + 1 / precision.square()
    constant = 0.5 * math.log(2 * math.pi * variance)
    return -dim * (constant + 0.5 * mean_square / variance)


# %%
# NBVAL_CHECK_OUTPUT
b = linear_schedule(4000)
integral = torch.trapezoid(expected_log_likelihood(b, 2), b).item()
print(f"integral {integral:.2f}, log p(x) {small_truth:.2f}")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} A control variate of your own
# :label: ex-eval-control
#
# *Build · 2 + 2 points · 20 minutes.*
#
# Two controls may predict more than one: the bound, and the number of white pixels. Write `adjusted_mean(values, images, controls)`, the estimate {eq}`eq-eval-control` for controls `[C, N]` of all N images, with the slopes of least squares. Then say what goes wrong if the slope of a single control is fixed at 1, and when that is harmless.
#
# ~~~python
# pixels = test[drawn[:num_control]].sum(1).cpu()
# controls = torch.stack([control, pixels]).double()
# hint = "regress the values on all controls at once, with an intercept"
# for slopes in ([1.0, 0.0], [0.4, -0.2]):
#     exact = 3 + torch.tensor(slopes).double() @ controls
#     yours = adjusted_mean(exact[few], few, controls)
#     checks.close(yours, exact.mean(), rtol=1e-6, label="the mean", hint=hint)
# ~~~
# ```

# %% [markdown] nbgrader={"grade": true, "solution": true, "points": 2}
# ```{solution-start} ex-eval-control
# :label: sol-eval-control
# :class: dropdown
# ```
#
# With $\beta = 1$ the estimate stays unbiased, since $\bar c$ is unbiased for the mean of $c$; its variance is that of $y - c$, which is as good only where the slope is near 1. For a bound on the same quantity it nearly is. For a control on another scale, such as the number of white pixels, $\beta = 1$ can be worse than no control at all.


# %% nbgrader={"solution": true, "points": 2}
def adjusted_mean(values, images, controls):
    seen = controls[:, images].mean(1)
    centred = controls[:, images] - seen[:, None]
    slopes = torch.linalg.lstsq(centred.T, values[:, None]).solution[:, 0]
    return values.mean() + slopes @ (controls.mean(1) - seen)


# %%
# NBVAL_CHECK_OUTPUT
pixels = test[drawn[:num_control]].sum(1).cpu()
for controls in (control[None], torch.stack([control, pixels])):
    found = adjusted_mean(recorded_hais, few, controls.double()).item()
    print(f"{len(controls)} control(s): {found:.1f} nats")

# %% [markdown]
# ```{solution-end}
# ```
#
# ## References
#
# ```{bibliography}
# :filter: docname in docnames
# ```
