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
# # Evaluation you can trust: annealed importance sampling and HAIS
#
# *Under a minute on two cores. You need the evidence lower bound and Hamiltonian Monte Carlo, as {doc}`/chapters/01_vi_recap` leaves them.*
#
# ```{admonition} What you will be able to do
# :class: tip
# - say why a lower bound cannot rank two models, and build two models that it ranks wrongly;
# - predict when importance sampling fails, and why its effective sample size will not tell you;
# - derive annealed importance sampling, write it in ten lines, and say what carried momentum adds;
# - certify an estimator from both sides with bidirectional Monte Carlo, and say what that does not certify;
# - evaluate a decoder of your own with numbers that another person can check.
# ```

# %% tags=["parameters"]
seed: int = 0  # of every random stream in this chapter
num_toy_runs: int = 1000  # independent chains behind each point of the toy figures
num_images: int = 6  # test images for the trained decoder
num_pairs: int = 8  # pairs simulated from it, for the certificate
num_chains: int = 4  # annealed chains per image
num_temperatures: int = 500  # temperatures for the trained decoder
num_leapfrog: int = 5  # leapfrog steps at each temperature
num_samples: int = 5000  # importance samples per image
device: str = "cpu"  # where the trained decoder is evaluated

# %%
from amortised import checks

checks.parameters(
    globals(),
    seed=checks.integer(minimum=0),
    num_toy_runs=checks.integer(minimum=100),
    num_images=checks.integer(minimum=2, maximum=10_000),
    num_pairs=checks.integer(minimum=2),
    num_chains=checks.integer(minimum=2),
    num_temperatures=checks.integer(minimum=10),
    num_leapfrog=checks.integer(minimum=1),
    num_samples=checks.integer(minimum=10),
    device=checks.device(),
)

# %%
import itertools
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from torch.distributions import Independent, Normal

from amortised import data, evaluation, plotting, results, tables
from amortised.ais import AISSettings, ais, bdmc, linear_schedule, sigmoid_schedule
from amortised.mcmc import hmc_step
from amortised.models import LinearGaussian
from amortised.numerics import effective_sample_size, log_mean_exp

plotting.use_style()


def stream(offset: int) -> torch.Generator:
    """A random stream of its own for each experiment: cells can be run in any order."""
    return torch.Generator().manual_seed(1000 * seed + offset)


# %% [markdown]
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
    return LinearGaussian(weight @ rotation, torch.zeros(3, dtype=torch.float64), noise_scale)


def mean_field_gap(model: LinearGaussian) -> float:
    precision = model.posterior(torch.zeros(1, 3, dtype=torch.float64)).precision_matrix[0]
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()


# %% [markdown]
# Model A generated the data below. Model B has too much noise, so it is truly the worse model. But A's latent axes are turned by 45 degrees, and B's are not.

# %%
model_a, model_b = rotated_model(math.pi / 4, 0.5), rotated_model(0.0, 0.65)
z = torch.randn(2000, 2, generator=stream(1), dtype=torch.float64)
noise = torch.randn(2000, 3, generator=stream(2), dtype=torch.float64)
x_linear = (z @ model_a.weight.T + 0.5 * noise).detach()

evidence = [results.mean_and_se(m.log_evidence(x_linear)) for m in (model_a, model_b)]
gaps = [mean_field_gap(m) for m in (model_a, model_b)]
difference = results.paired_difference(
    model_a.log_evidence(x_linear), model_b.log_evidence(x_linear)
)
results.markdown_table(
    ["model", "mean log p(x), exact", "best mean-field bound"],
    [[n, e, e.mean - g] for n, e, g in zip("AB", evidence, gaps, strict=True)],
)

# %%
# NBVAL_CHECK_OUTPUT
print("better by the exact evidence:", "A" if difference.mean > 4 * difference.se else "B")
print("better by the bound:         ", "A" if difference.mean > gaps[0] - gaps[1] else "B")
print(f"mean-field gaps: A {gaps[0]:.2f}, B {gaps[1]:.2f} nats")

# %% [markdown]
# The bound prefers the wrong model, with the *best possible* mean-field $q$ and no amortisation error. Training by the bound, a model learns to have posteriors that its $q$ can follow. That is a property of the pair, not of $p_\theta(x)$. To compare decoders we must estimate $p_\theta(x)$ itself.
#
# ## Importance sampling, and how it fails
#
# Draw $z_k \sim r(z \mid x)$ and average the weights $w_k = p_\theta(x, z_k) / r(z_k \mid x)$. The mean of the weights is unbiased, so by Jensen's inequality its logarithm is too low on average. How much too low depends on the variance of $w$, and variances of products grow exponentially with the number of factors.
#
# We watch this where the truth is known: $D$ independent copies of $z \sim \mathcal{N}(0,1)$, $x \mid z \sim \mathcal{N}(z, \sigma^2)$. Three proposals are tried: the prior; the exact posterior with its standard deviations halved, since a $q$ trained by the bound errs on that side; and the posterior widened by 30 %.

# %% [markdown]
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
    return LinearGaussian(torch.eye(dim).double(), torch.zeros(dim).double(), noise_scale)


@torch.no_grad()
def importance_sampling(dim: int, width: float | None, num_images: int = 20):
    """Mean error in nats, and how many times the ESS underrates the error."""
    model, generator = independent_model(dim), stream(3)
    x = torch.randn(num_images, dim, generator=generator, dtype=torch.float64)
    x = math.sqrt(1 + noise_scale**2) * x  # its distribution under the model
    exact = model.posterior(x)
    mean, sd = (0.0 * x, 1.0) if width is None else (exact.mean, width * exact.stddev)
    draws = torch.randn(num_samples, *x.shape, generator=generator, dtype=torch.float64)
    z = mean + sd * draws
    log_r = Independent(Normal(mean, sd), 1).log_prob(z)
    log_weights = model.log_joint(x, z) - log_r
    error = log_mean_exp(log_weights, dim=0) - model.log_evidence(x)
    suggested = (1 / effective_sample_size(log_weights) - 1 / num_samples).sqrt()
    return error.mean().item(), (error.square().mean().sqrt() / suggested.mean()).item()


dims = [1, 2, 4, 8, 16, 32]
proposals = {"prior": None, "posterior, half as wide": 0.5, "posterior, 30 % wider": 1.3}
curves = {
    name: torch.tensor([importance_sampling(d, width) for d in dims])
    for name, width in proposals.items()
}

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-eval-is", "caption": "Importance sampling with a fixed number of samples, on a model whose evidence is known. Left: mean error in nats; zero is exact. Right: root-mean-square error, in units of the standard error that the effective sample size suggests; one is honest."}, "image": {"alt": "Two panels against the dimension of the latent. Left, the error of the prior proposal falls to a hundred nats below zero, that of the narrow posterior to a few nats, and that of the wide one stays near zero. Right, only the wide proposal stays near one; the narrow one rises to several times and the prior far beyond."}}
figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2))
for (name, values), marker in zip(curves.items(), "osD", strict=True):
    axes[0].plot(dims, values[:, 0], marker=marker, label=name)
    axes[1].plot(dims, values[:, 1], marker=marker)
axes[0].set(xlabel="latent dimension D", ylabel="error, nats", xscale="log", yscale="symlog")
axes[0].set_ylim(top=1.0)
axes[0].set_yticks([0, -1, -10, -100], labels=["0", "−1", "−10", "−100"])
axes[1].axhline(1.0, color=plotting.GREY, linestyle=":")
axes[1].set(
    xlabel="latent dimension D", ylabel="error / suggested error", xscale="log", yscale="log"
)
axes[0].legend(fontsize="small", loc="lower left")
for ax in axes:
    ax.set_xticks(dims, labels=dims)
    ax.minorticks_off()
plt.show()

# %%
# NBVAL_CHECK_OUTPUT
names = list(proposals)
print("largest error in 32 dimensions:", min(names, key=lambda n: curves[n][-1, 0]))
for name in names[1:]:
    error, ratio = curves[name][-1].tolist()
    print(f"{name}: off by more than a nat {abs(error) > 1}, ESS underrates it {ratio > 3}")

# %% [markdown]
# The prior is hopeless beyond a few dimensions: {numref}`fig-eval-is`. {cite:t}`chatterjee2018sample` show that importance sampling needs about $\exp \operatorname{KL}(p(z \mid x) \,\|\, r)$ samples, and that divergence is a sum over dimensions.
#
# The narrow proposal is the dangerous one. It is centred right, it has the right shape, it is merely too sure of itself. Its weights have infinite variance as soon as its width falls below $1/\sqrt{2} \approx 71\,\%$ of the posterior's, in any number of dimensions: the samples that would carry the estimate are never drawn. The estimate is low, *and the effective sample size does not say so*, because {eq}`eq-eval-ess` is computed from the samples that were found. It cannot count what is missing. The plainest case has two modes.

# %%
log_p = torch.tensor([0.5, 0.5]).log()  # two equal modes, at -4 and +4
z = 4.0 + torch.randn(num_samples, generator=stream(4))  # a proposal that knows one of them
log_mode = [-0.5 * (z - m).square() for m in (-4.0, 4.0)]
log_target = torch.logaddexp(log_p[0] + log_mode[0], log_p[1] + log_mode[1])
log_weights = log_target - log_mode[1]
print(f"ESS {effective_sample_size(log_weights).item():.0f} of {num_samples}")
print(f"error {log_mean_exp(log_weights, 0).item():.3f} nats; log(1/2) = {math.log(0.5):.3f}")

# %% [markdown]
# A perfect effective sample size, and an error of $\log 2$: half of the mass is absent and nothing in the sample says so. **A low ESS is bad news. A high ESS is not good news.**
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


# %%
def annealed_importance_sampling(log_prior, log_likelihood, z, schedule, step_size, generator):
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
def toy_path(dim: int) -> dict:
    """One observation of the independent model: the two terms of the path, and log p(x)."""
    model, x = independent_model(dim), torch.ones(1, dim, dtype=torch.float64)
    terms = model.prior().log_prob, lambda z: model.log_likelihood(x, z)
    return {"terms": terms, "truth": model.log_evidence(x).item()}


def toy_start(dim: int, offset: int) -> torch.Tensor:
    return torch.randn(num_toy_runs, 1, dim, generator=stream(offset), dtype=torch.float64)


small, schedule = toy_path(2), linear_schedule(30)
with torch.no_grad():
    by_hand, _ = annealed_importance_sampling(
        *small["terms"], toy_start(2, 5), schedule, 0.2, stream(6)
    )
annealing = AISSettings(schedule, step_size=0.2, num_leapfrog=3)
library = ais(small["terms"], toy_start(2, 7), annealing, generator=stream(8))

# %%
# NBVAL_CHECK_OUTPUT
for name, log_weights in (("ten lines", by_hand), ("library", library.log_weights)):
    ratio = (log_weights[:, 0] - small["truth"]).exp()
    checks.within_error(
        ratio.mean(), 1.0, ratio.std() / math.sqrt(len(ratio)), label=f"E[w] / p(x), {name}"
    )

# %% [markdown]
# ## What a chain costs, and what momentum buys
#
# The weight of one chain is off by $\log p(x) - \mathbb{E} \log w$. When the transitions keep up with the path this gap falls as $1/T$: twice as many temperatures, half the gap. What "keeping up" takes is the business of the kernel. Two choices share the name HAIS in the literature, and tables rarely say which one they used.
#
# - **AIS with HMC transitions**: at each temperature draw a fresh momentum and make $L$ leapfrog steps {cite:p}`wu2017decoders`.
# - **HAIS** {cite:p}`sohldickstein2012hais`: one leapfrog step per temperature, and keep most of the momentum: $v \leftarrow a v + \sqrt{1 - a^2}\, n$. If the step is rejected, negate it. The chain then sails through the temperatures and does not start a new random walk at each one.
#
# One routine makes both. Compare them, and plain Langevin steps ($L = 1$, $a = 0$), at equal numbers of gradients, now with 16 latents.

# %%
kernels = {  # leapfrog steps per temperature, persistence
    "Langevin, L = 1": (1, 0.0),
    "AIS+HMC, L = 5": (5, 0.0),
    "HAIS, L = 1": (1, 0.85),
}
budgets = [50, 100, 200, 400, 800]  # gradients per chain
wide = toy_path(16)


def one_chain_gap(budget: int, leapfrog: int, persistence: float, schedule_fn=linear_schedule):
    schedule = schedule_fn(budget // leapfrog)
    annealing = AISSettings(schedule, 0.25, leapfrog, persistence)
    z0, rng = toy_start(16, 9), stream(10)
    run = ais(wide["terms"], z0, annealing, generator=rng, final_transition=False)
    return results.mean_and_se(wide["truth"] - run.log_weights[:, 0])


gap_curves = {
    name: [one_chain_gap(b, *kernel) for b in budgets] for name, kernel in kernels.items()
}

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-eval-momentum", "caption": "Mean gap $\\log p(x) - \\mathbb{E} \\log w$ of one chain against its number of gradients, for three transitions with the same leapfrog step. Bars are two standard errors; the dotted line has slope $-1$."}, "image": {"alt": "Three falling lines on doubly logarithmic axes, nearly straight with slope minus one. The line of HAIS lies lowest, Langevin highest."}}
figure, ax = plt.subplots(figsize=(6.0, 3.6))
for (name, points), mark in zip(gap_curves.items(), "osD", strict=True):
    mean, se = zip(*[(p.mean, 2 * p.se) for p in points], strict=True)
    ax.errorbar(budgets, mean, yerr=se, marker=mark, label=name)
ax.plot(budgets, [0.6 * mean[-1] * budgets[-1] / b for b in budgets], ":", color=plotting.GREY)
ax.set(xlabel="gradients per chain", ylabel="gap, nats", xscale="log", yscale="log")
ax.set_xticks(budgets, labels=budgets)
ax.minorticks_off()
ax.legend()
plt.show()

# %%
# NBVAL_CHECK_OUTPUT
log_gaps = torch.tensor([[p.mean for p in points] for points in gap_curves.values()]).log()
log_budgets = torch.tensor(budgets).log()
centred = (log_budgets - log_budgets.mean())[-3:] - (log_budgets - log_budgets.mean())[-3:].mean()
slopes = (log_gaps[:, -3:] * centred).sum(1) / centred.square().sum()
for name, slope in zip(kernels, slopes.tolist(), strict=True):
    print(f"{name:16s} slope over the last budgets between -1.3 and -0.7: {-1.3 < slope < -0.7}")
best = min(gap_curves, key=lambda name: gap_curves[name][-1].mean)
print("smallest gap at the largest budget:", best)

# %% [markdown]
# ## The schedule
#
# The weight collects $\int_0^1 \mathbb{E}_{f_b} \log p_\theta(x \mid z)\, db$ in steps. The integrand, which {py:class}`amortised.ais.AISResult` records as `mean_log_likelihood`, moves most where the likelihood begins to matter, near $b = 0$, so temperatures should be dense there. A sigmoid schedule makes them dense at both ends. For images, whose log-likelihood changes by hundreds of nats over the first few per cent of the path, that is a large gain; {ref}`ex-eval-schedule` measures it on the trained decoder.
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
    path = toy.prior().log_prob, lambda z: toy.log_likelihood(pair_x, z)
    annealing = AISSettings(sigmoid_schedule(temperatures), 0.25, num_leapfrog=5)
    bounds = bdmc(path, z0, pair_z, annealing, generator=stream(14))
    lower, upper = bounds.lower - pair_truth, bounds.upper - pair_truth
    return results.mean_and_se(lower), results.mean_and_se(upper)


lengths = [5, 10, 20, 40, 80]
sandwich = [toy_sandwich(t) for t in lengths]

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-eval-sandwich", "caption": "Bidirectional Monte Carlo on 200 simulated pairs of the linear model: mean error of the forward (lower) and the reverse (upper) bound, four chains each, with two standard errors. The truth is the line at zero."}, "image": {"alt": "Two curves close in on the zero line from below and from above as the number of temperatures grows."}}
figure, ax = plt.subplots(figsize=(6.0, 3.2))
for side, name, colour in (
    (1, "reverse: upper bound", "approximation"),
    (0, "forward: lower bound", "bound"),
):
    points = [pair[side] for pair in sandwich]
    ax.errorbar(
        lengths, [p.mean for p in points], yerr=[2 * p.se for p in points], marker="o",
        color=plotting.COLOURS[colour], label=name,
    )  # fmt: skip
ax.axhline(0.0, color=plotting.COLOURS["exact"], linestyle="--", label="exact log p(x)")
ax.set(xlabel="temperatures T", ylabel="error, nats", xscale="log")
ax.set_xticks(lengths, labels=lengths)
ax.minorticks_off()
ax.legend()
plt.show()

# %%
# NBVAL_CHECK_OUTPUT
for temperatures, (lower, upper) in zip(lengths, sandwich, strict=True):
    ordered = lower.mean < 4 * lower.se and upper.mean > -4 * upper.se
    print(f"T = {temperatures:2d}: lower <= truth <= upper within error: {ordered}")

# %% [markdown]
# ## What breaks it: steps that adapt while you measure
#
# {prf:ref}`thm-eval-unbiased` asks that each kernel leave $f_t$ invariant. A kernel whose step size depends on the chain's own past does not: it moves some positions further than others. Many programs adapt the step during the very run they report, and still call the result a lower bound. On one latent dimension the effect can be measured. The rule is the usual one, per chain: after an acceptance probability above 0.65 multiply the step by a factor, else divide by it.


# %%
def adapting_weights(factor: float, num_chains: int, temperatures: int = 20) -> torch.Tensor:
    generator = stream(15)
    z = torch.randn(num_chains, 1, generator=generator)
    step_size, log_weights = torch.full_like(z, 0.5), torch.zeros(num_chains)
    likelihood = Normal(2.0, 0.3)
    for t in range(1, temperatures + 1):
        log_weights += likelihood.log_prob(z[:, 0]) / temperatures

        def annealed(z, b=t / temperatures):
            return -0.5 * z[:, 0].square() + b * likelihood.log_prob(z[:, 0])

        state, info = hmc_step(z, annealed, step_size, 1, generator=generator)
        z, better = state.z, info.acceptance_probability[:, None] > 0.65
        step_size = step_size * torch.where(better, factor, 1.0 / factor)
    return log_weights


log_evidence = Normal(0.0, math.sqrt(1 + 0.3**2)).log_prob(torch.tensor(2.0))
factors = [1.0, 1.02, 1.1, 1.2, 1.5, 2.0]
ratios = [
    results.mean_and_se((adapting_weights(f, 500 * num_toy_runs) - log_evidence).double().exp())
    for f in factors
]
results.markdown_table(
    ["factor per temperature", "E[w] / p(x)"],
    [["1 (frozen)" if f == 1 else f"{f:g}", r] for f, r in zip(factors, ratios, strict=True)],
    decimals=3,
)

# %%
# NBVAL_CHECK_OUTPUT
print("frozen steps unbiased within 4 standard errors:", abs(ratios[0].mean - 1) < 4 * ratios[0].se)
worst = max(ratios, key=lambda r: r.mean)
print("some adapting rule overestimates p(x):", worst.mean - 1 > 4 * worst.se)

# %% [markdown]
# An estimate of $p(x)$ that is too high *on average* is no lower bound. A factor of 1.02 is hard to tell from none in the table, and {cite:t}`wu2017decoders` average the acceptance over many chains, which ties a step less closely to any one of them. But no theorem limits the effect. The remedy costs one short run. A *pilot* adapts; its steps are frozen; a new run with new random numbers is reported. {py:func}`amortised.ais.tune_step_size` is the pilot.
#
# ## A trained decoder
#
# Now the decoder of this book: 32 latents, three transposed convolutions, trained as a variational auto-encoder. Its weights are in the repository, with a record of how they were made.
#
# First, watch a few chains. The ten lines from above anneal six chains for each of three digits. The decoder draws what each $z_t$ stands for. At $b = 0$ the chains know nothing of the digit; long before $b = 1$ they agree.

# %%
folder = data.data_folder() / "models" / "reference"
decoder = evaluation.load_module(folder / "vae-laptop-seed0-decoder.safetensors", device)
encoder = evaluation.load_module(folder / "vae-laptop-seed0-encoder.safetensors", device)
for module in (decoder, encoder):
    module.requires_grad_(False)
images = data.load_mnist_binary("test").images.to(device)
x_test, x_shown = images[:num_images], images[:3]
with torch.no_grad():
    z0 = torch.randn(6, 3, 32, generator=stream(16)).to(device)
    _, path = annealed_importance_sampling(
        decoder.prior().log_prob, lambda z: decoder.log_likelihood(x_shown, z),
        z0, sigmoid_schedule(40), 0.08, None if device != "cpu" else stream(17),
    )  # fmt: skip
    shown = decoder.likelihood(path[[0, 4, 8, 12, 16, 20, 24, 32, 40]]).mean.cpu()

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-eval-annealing", "caption": "Annealing. In each frame: left, three observed test digits; right, what six chains for each believe at this inverse temperature."}, "image": {"alt": "An animation: six columns of unrelated blurred digits turn into six near copies of the observed digit at the left of each of three rows."}}
betas = sigmoid_schedule(40)[[0, 4, 8, 12, 16, 20, 24, 32, 40]].tolist()


def draw(figure, frame):
    ax = figure.subplots()
    parts = x_shown[:, None].cpu(), torch.zeros(3, 1, 784), shown[frame].transpose(0, 1)
    plotting.show_digits(torch.cat(parts, dim=1).reshape(-1, 784), ncols=8, ax=ax)
    ax.set_title(f"b = {betas[frame]:.3f}")


plotting.animate(
    draw, len(betas), size=(4.6, 2.0), fps=2.5, num_colours=32,
    alt="Chains turn from unrelated digits into the observed ones.",
)  # fmt: skip

# %% [markdown]
# Then the numbers: importance sampling with the encoder, AIS+HMC, and HAIS with the same number of gradients. Step sizes come from a pilot; all are estimates *of the same quantity for the same images*, so we compare them in pairs.

# %%
settings = dict(num_chains=num_chains, pilot_chains=2, seed=seed)
hmc = dict(num_temperatures=num_temperatures, num_leapfrog=num_leapfrog)
hais = dict(num_temperatures=num_temperatures * num_leapfrog, num_leapfrog=1, persistence=0.9)
importance = evaluation.importance_sampling_ll(
    decoder, encoder, x_test, num_samples=num_samples, seed=seed
)
estimates = {
    f"importance sampling, K = {num_samples}": importance,
    f"AIS+HMC, L = {num_leapfrog}": evaluation.hais_ll(decoder, x_test, **hmc, **settings),
    "HAIS, L = 1": evaluation.hais_ll(decoder, x_test, **hais, **settings),
}
rows = []
for name, e in estimates.items():
    paired = results.paired_difference(e.log_likelihood, importance.log_likelihood)
    ess = f"{e.ess.mean().item():.1f} of {e.num_samples}"
    rows.append([name, e.summary, None if e is importance else paired, ess])
results.markdown_table(
    ["estimator", "mean log p(x)", "minus importance sampling, in pairs", "ESS"], rows
)

# %% [markdown]
# Read the columns with care. The first standard error is the spread over *images*: it is large because there are few of them, and it says nothing about the estimators. The paired column removes it. All three are lower bounds on average, so a *higher* value is a better estimate, and no value here needs a truth to be compared with. The two effective sample sizes are not on one scale: each is out of its own number of samples.
#
# How low are they? The sandwich answers for data that the decoder itself generates. We certify the settings of the last row.

# %%
certificate = evaluation.bdmc_ll(decoder, num_pairs, **hais, **settings)
gap = certificate.expected_gap
print(f"upper minus lower, {gap.n} simulated pairs: {gap.mean:.2f} ± {gap.se:.2f} nats")

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-eval-bdmc", "caption": "Bounds on $\\log p(x)$ for digits that the decoder generated itself, relative to the middle of each pair of bounds."}, "image": {"alt": "For each simulated digit a short vertical interval around zero, from the lower to the upper bound."}}
figure, ax = plt.subplots(figsize=(6.4, 2.8))
middle = 0.5 * (certificate.lower + certificate.upper)
image = torch.arange(len(middle))
half = 0.5 * (certificate.upper - certificate.lower)
ax.errorbar(image, torch.zeros_like(middle), yerr=half.abs(), fmt="none", capsize=5, elinewidth=2)
ax.axhline(0.0, color=plotting.GREY, linewidth=0.8)
ax.set(xlabel="simulated pair", ylabel="nats from the middle")
ax.set_xticks(image)
plt.show()

# %%
# NBVAL_CHECK_OUTPUT
print("mean gap below 1 nat at these settings:", gap.mean < 1.0)

# %% [markdown]
# What this certifies: *for images that the model generates, estimates at these settings are off by less than the gap, on average*. What it does not: real digits are not samples of the model, and their posteriors may be harder. For them the honest practice is to lengthen the chains and watch the estimate stop rising.
#
# (sec-eval-results)=
# ## Published and own results
#
# The decoder above has a longer evaluation on record, with 16 chains of 1,000 temperatures; the next cell shows it first. But one model alone says little about an estimator. {cite:t}`li2017amc` evaluated ten ways to train one small decoder twice: by importance sampling with $K = 5000$ and by annealing with $K = 100$. The ten rows are a study of this book too; chapter 5 says what they are. Here we only ask how well they were *measured*. Published and recorded values differ in training and length of training, so compare within a column.

# %%
path = data.data_folder() / "results/reference/vae-laptop-seed0.json"
metrics = results.load_result(path).record["metrics"]
columns = ["AIS+HMC", "importance sampling, K = 5000", "certificate, simulated pairs"]
names = ["ais_ll", "is_ll", "simulated_gap"]
display(results.markdown_table(columns, [[metrics[name] for name in names]]))

published = {
    metric: {e["row"]: e for e in results.load_published("amc", table="Table 1", metric=metric)}
    for metric in ("IS-LL", "HAIS-LL")
}
study = dict(zip(
    ["vae", "mcmc_vi_t5", "amc_gaussian_t5", "amc_cnn_g_t5", "amc_cnn_g_t50", "avb_cnn_g",
     "amc_cnn_b_t5", "amc_cnn_b_t50", "avb_cnn_b", "persistent_t50"],
    published["HAIS-LL"], strict=True,
))  # fmt: skip
labels = {row: name.replace(" |", ",") for row, name in study.items()}
printed = {row: published["HAIS-LL"][name]["printed"] for row, name in study.items()}
tables.study_table("amc_table1", labels, "ais_ll", printed, decimals=1)

# %% [markdown]
# Each recorded mean has two errors, over images and over trainings. Ours is AIS+HMC, with fresh momentum; the source says HAIS and does not say which.
#
# The next table subtracts. How much does annealing find that importance sampling has missed? The proposal is the same kind for every row, a Gaussian fitted to the finished decoder, and the differences are taken in pairs. The last column is the certificate: the gap of the sandwich on digits that the decoder itself generated.

# %%
# NBVAL_CHECK_OUTPUT
recorded = tables.load_study("amc_table1", "laptop")
missed, rows = {"published": {}, "laptop": {}}, []
for row, name in study.items():
    missed["published"][row] = (
        published["HAIS-LL"][name]["value"] - published["IS-LL"][name]["value"]
    )
    runs = [run.per_image for run in recorded[row]]
    pooled = tables.pool([values["ais_ll"] - values["posthoc_is_ll"] for values in runs])
    missed["laptop"][row] = pooled.mean
    gap = tables.pool([values["simulated_gap"] for values in runs]).text(1)
    rows.append([labels[row], missed["published"][row], pooled.text(1), gap])
columns = ["row", "annealed minus IS, published", "in pairs, laptop", "certificate, laptop"]
display(results.markdown_table(columns, rows))
worst = [set(sorted(values, key=values.get)[-5:]) for values in missed.values()]
print("the same five rows lose most by importance sampling:", worst[0] == worst[1])
print(*sorted(worst[0]), sep=", ")

# %% [markdown]
# The pattern of the source returns, with other trainings and another proposal. Where the posterior of the decoder is far from Gaussian, importance sampling misses several nats, and the rows change places. A decoder that was trained by chains, or by a game, has no reason to keep its posterior Gaussian; one trained with a Gaussian encoder has every reason to.
#
# The certificate says how far to trust the annealed column. At this short schedule it is worst for the decoders with the sharpest posteriors, so their values are too low by more: the order among rows that are far apart stands, the order among neighbours would need longer chains.

# %% [markdown]
# ## Evaluate your own decoder
#
# Any module with `prior()` and `log_likelihood(x, z)` will do. Ten lines, ready to paste:

# %%
from torch import nn

from amortised.models import BernoulliDecoder

torch.manual_seed(seed)
network = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 784))  # your decoder here
mine = BernoulliDecoder(network, latent_dim=2, observation_dim=784)
estimate = evaluation.hais_ll(mine, x_test.cpu(), num_chains=8, num_temperatures=30, seed=seed)
bound = evaluation.bdmc_ll(mine, num_pairs, num_chains=8, num_temperatures=30, seed=seed)
print(f"log p(x) >= {estimate.summary.mean:.1f} ± {estimate.summary.se:.1f} nats (untrained)")
gap_mine = bound.expected_gap
print(f"certified to {gap_mine.mean:.2f} ± {gap_mine.se:.2f} nats on its own samples")

# %% [markdown]
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
# - Importance sampling fails with dimension, and a narrow proposal fails quietly. The effective sample size cannot see what was not sampled.
# - Annealed importance sampling is importance sampling on whole chains. It is unbiased at any length, and its gap falls as one over the number of temperatures. Carried momentum buys a smaller gap for the same gradients; a table should say which variant it used.
# - Reverse chains from exact posterior samples give an upper bound. The sandwich certifies settings on simulated data, and no more.
# - Step sizes are tuned in a pilot and frozen. A run that adapts while it measures can overestimate.
#
# ## Exercises
#
# ```{exercise} One temperature
# :label: ex-eval-one
# Show that annealed importance sampling with $T = 1$ is importance sampling from the prior. Verify it in code for the toy model, with equal random numbers.
# ```
#
# ```{solution-start} ex-eval-one
# :label: sol-eval-one
# :class: dropdown
# ```
#
# With $T = 1$ the weight {eq}`eq-eval-weight` has one factor, $f_1(z_0) / f_0(z_0) = p_\theta(x \mid z_0)$ with $z_0 \sim p(z)$: the prior cancels, and what the transition does afterwards does not enter.

# %%
z0 = toy_start(2, 18)
single = ais(small["terms"], z0, annealing._replace(schedule=linear_schedule(1)))
_, log_likelihood = small["terms"]
expected = log_likelihood(z0).detach()
checks.close(single.log_weights, expected, label="the log-weight at T = 1")

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} A better start
# :label: ex-eval-start
# Nothing in {prf:ref}`thm-eval-unbiased` needs the path to begin at the prior. Start the chains from the encoder (`start=encoder` in {py:func}`amortised.evaluation.hais_ll`, {py:func}`amortised.ais.path_from` below it) and compare with the start from the prior, in pairs, at a quarter of the temperatures. When would you rather start from the prior?
# ```
#
# ```{solution-start} ex-eval-start
# :label: sol-eval-start
# :class: dropdown
# ```

# %%
short = {**settings, "num_temperatures": max(10, num_temperatures // 4)}
from_prior = evaluation.hais_ll(decoder, x_test, num_leapfrog=num_leapfrog, **short)
from_encoder = evaluation.hais_ll(
    decoder, x_test, num_leapfrog=num_leapfrog, start=encoder, **short
)
gain = results.paired_difference(from_encoder.log_likelihood, from_prior.log_likelihood)
print(f"encoder minus prior: {gain.mean:.2f} ± {gain.se:.2f} nats")

# %% [markdown]
# Both are lower bounds on average, so a positive difference is a gain. The encoder's start is the better one while the encoder covers the posterior. Where it misses a mode, a chain must cross to it at temperatures at which the target has two modes already; from the prior, it only has to be sorted into one of them early.
#
# ```{solution-end}
# ```
#
# ```{exercise} Thermodynamic integration
# :label: ex-eval-thermo
# Differentiate $\log \int f_b(z)\, dz$ in $b$ and show that $\log p_\theta(x) = \int_0^1 \mathbb{E}_{f_b}[\log p_\theta(x \mid z)]\, db$. Estimate the integral from `library.mean_log_likelihood` by the trapezoidal rule and compare with the truth. Is this estimate a bound?
# ```
#
# ```{solution-start} ex-eval-thermo
# :label: sol-eval-thermo
# :class: dropdown
# ```
#
# $\frac{d}{db} \log \int f_b = \int \log p_\theta(x \mid z) f_b / \int f_b = \mathbb{E}_{f_b} \log p_\theta(x \mid z)$, and the two ends are $\log 1$ and $\log p_\theta(x)$. Row $t$ of the record is the mean before the increment $t$, that is, at $b_{t-1}$.

# %%
_, log_likelihood = small["terms"]
final = log_likelihood(library.z).mean(0).detach()
integrand = torch.cat([library.mean_log_likelihood[:, 0], final])
integral = torch.trapezoid(integrand, schedule)
checks.close(integral, small["truth"], atol=1.0, label="the thermodynamic integral")

# %% [markdown]
# It is no bound. Chains that lag behind the temperature make the integrand too small, and the trapezoidal rule errs with the sign of the curvature; the two need not add up to an error of known sign. The sum {eq}`eq-eval-weight` is the same integral by the left-hand rule, *chain by chain and inside the exponential*, and that is what makes it one.
#
# ```{solution-end}
# ```
#
# ```{exercise} Schedules
# :label: ex-eval-schedule
# For the trained decoder, compare `linear_schedule` and `sigmoid_schedule` (argument `schedule_fn`) at the same number of temperatures, in pairs. Explain the sign.
# ```
#
# ```{solution-start} ex-eval-schedule
# :label: sol-eval-schedule
# :class: dropdown
# ```

# %%
linear = evaluation.hais_ll(
    decoder, x_test, num_leapfrog=num_leapfrog, schedule_fn=linear_schedule, **short
)
gain = results.paired_difference(from_prior.log_likelihood, linear.log_likelihood)
print(f"sigmoid minus linear: {gain.mean:.2f} ± {gain.se:.2f} nats")

# %% [markdown]
# Both are lower bounds on average, so the higher one is the better. The first increments of the linear schedule multiply log-likelihoods of many hundred nats below the final ones by $1/T$. Those increments differ between chains by many nats, and the variance of the weight is decided there. The sigmoid schedule takes its smallest steps exactly there.
#
# ```{solution-end}
# ```
#
# ## References
#
# ```{bibliography}
# :filter: docname in docnames
# ```
