"""DDPG that compresses a classifier and its code step by step, after AMC (arXiv 1802.03494; METHODS 5.1).

An actor mu(s) says for each step of an episode (`Compression`) how much to keep, a critic Q(s, a) what reward the finished candidate will bring; noise
around mu explores, every evaluated candidate is learned from. Deviations from AMC follow; "gap" is the mean of `benchmarks/surrogates.py` at 200
evaluations over four runs (two instances, two seeds), before and after that one change, enough to choose by and no more:

* Critic targets are the episode's own reward, which with gamma = 1 and every step paid the final reward is what all of its steps are worth: no
  bootstrapping, hence no target networks and no tau (gap .18 -> .10).
* Rewards are standardised over the replay memory instead of less a moving average (.22 -> .18, within the runs' spread).
* The actor also imitates the best episodes; without, some runs never got beyond their warm-up (.28 -> .06).
* A proposal is the best of a few noisy episodes by the critic's Q at their last step, which costs no evaluation (.06 -> .02). One episode without
  noise among them did harm in the one run it had (.04 -> .09).
* Actor and critic learn at the same rate: one run has a quarter of AMC's episodes (.04 -> .02).
* The state also says which step it is and what each step chose so far (`Compression`), so that the process is Markov; not measured alone.
* Warm-up is a share of the evaluations. Noise shrinks geometrically to `sigma_end`, for AMC's .5 * .95**700 = 1e-16 would soon propose one candidate
  only; not measured against AMC's.
* 8 updates follow an episode, whatever its steps. Replay holds the last 100 episodes as there, but never drops the best.
* One agent serves all cuts and reward weights: each evaluation is learned from under every weight, as what it would have been paid is known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import ParamsError
from pipeline.search.candidate import OUTPUT, Candidate, Measurement
from pipeline.search.environment import Compression, Costing
from pipeline.search.limits import Limits
from pipeline.search.pareto import Trial
from pipeline.search.space import Space

REWARD_WEIGHTS = (0.03, 0.1, 0.3)
TRIES = 8  # at a candidate not told before


@dataclass(frozen=True)
class DdpgSettings:
    """What the agent is run with; names after AMC where it has one.

    Raises:
        ParamsError: weights that are none, negative, or several where the reward takes none.
    """

    cut: str | None = None  # the cut searched; None: all, those that do best for longer
    reward: Literal["linear", "log"] = "linear"  # accuracy - weight * T/T_ref, or -error * ln(1 + T/T_ref)
    reward_weights: tuple[float, ...] = (0.3,)  # of latency in the linear reward; several, taken in turn, trace a front
    penalty: float = 1.0  # reward lost per point of accuracy below the floor, and per share of memory above what there is
    warm_up: float = 0.1  # share of the evaluations whose actions are uniform
    sigma: float = 0.5  # of the truncated normal noise after warm-up
    sigma_end: float = 0.02  # of the noise at the last evaluation
    hidden: int = 300  # width of both hidden layers of actor and critic
    actor_rate: float = 1e-3  # Adam's
    critic_rate: float = 1e-3  # Adam's
    batch: int = 64  # steps an update learns from
    updates: int = 8  # of actor and critic after each episode
    replay_episodes: int = 100  # the last ones and the best
    elites: int = 10  # best episodes of a cut and weight that the actor imitates, at most half of what there is
    imitation: float = 3.0  # weight of imitating them beside Q
    proposals: int = 8  # noisy episodes that the critic chooses from

    def __post_init__(self) -> None:
        if not self.reward_weights or min(self.reward_weights) < 0:
            raise ParamsError(f"reward_weights is {list(self.reward_weights)}; give one weight or more, none negative.")
        if self.reward == "log" and len(self.reward_weights) > 1:
            raise ParamsError(f"reward log takes no weight but has {len(self.reward_weights)}; give one, or reward linear.")


class Actor(nn.Module):
    """mu(s): states (N, columns) -> actions (N, 1) in (0, 1)."""

    def __init__(self, columns: int, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, 1)
        nn.init.uniform_(last.weight, -3e-3, 3e-3)  # as DDPG: start in the sigmoid's middle
        self.layers = nn.Sequential(nn.Linear(columns, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), last, nn.Sigmoid())

    def forward(self, states: Tensor) -> Tensor:
        return self.layers(states)  # type: ignore[no-any-return]


class Critic(nn.Module):
    """Q(s, a): states (N, columns), actions (N, 1) -> values (N, 1); relu(W1 s + W2 a) -> hidden -> 1."""

    def __init__(self, columns: int, hidden: int) -> None:
        super().__init__()
        self.of_state, self.of_action = nn.Linear(columns, hidden), nn.Linear(1, hidden, bias=False)
        last = nn.Linear(hidden, 1)
        nn.init.uniform_(last.weight, -3e-3, 3e-3)
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), last)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.layers(self.of_state(states) + self.of_action(actions))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Episode:
    """An evaluated candidate as the agent went or would have gone: `states` (steps, columns), `actions` (steps, 1), and its reward under each weight.

    The rewards of one that failed are None.
    """

    cut: str
    states: Tensor
    actions: Tensor
    rewards: tuple[float, ...] | None


class DdpgSearcher:
    """A `Searcher` that learns from every trial whose candidate an episode can make, whoever proposed it.

    `history` has a row for each, in the order told: number, cut, weight, reward (None: failed), sigma (None: warm-up).
    `trials` is the number of evaluations the search is to have, the baselines not counted; no proposal exceeds `budget_ms` end to end, None: no budget.

    Raises:
        ParamsError: `settings.cut` is not in the space.
        CoinferError: see `Compression`.
    """

    def __init__(self, space: Space, costing: Costing, limits: Limits, settings: DdpgSettings, *, seed: int, trials: int, budget_ms: float | None) -> None:
        cuts = [*space.codes, OUTPUT]
        if settings.cut is not None and settings.cut not in cuts:
            raise ParamsError(f"search.ddpg.cut is {settings.cut}, which the space does not have; it has {', '.join(cuts)}.")
        self.environment = Compression(space, costing, [settings.cut] if settings.cut else cuts, budget_ms)
        self.limits, self.settings, self.seed, self.trials = limits, settings, seed, trials
        self.history: list[dict[str, Any]] = []
        self._first = len(space.baselines())
        self._reference_ms = costing.bound_ms(Candidate(OUTPUT))
        columns = len(self.environment.reset()[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor, self.critic = Actor(columns, settings.hidden), Critic(columns, settings.hidden)
        self._optimisers = {
            "actor": torch.optim.Adam(self.actor.parameters(), settings.actor_rate, fused=True),
            "critic": torch.optim.Adam(self.critic.parameters(), settings.critic_rate, fused=True),
        }
        self._draws = torch.Generator().manual_seed(seed)
        self._replay: list[Episode] = []
        self._told: set[Candidate] = set()
        self._best: dict[str, tuple[float, ...]] = {}  # cut -> the best reward under each weight

    def ask(self, number: int) -> Candidate:
        """One not told before, as far as a few tries find one. Nothing of the agent changes."""
        survivors, sigma, rng = self._survivors(number), self._sigma(number), np.random.default_rng([self.seed, number])
        cut = survivors[number % len(survivors)]
        for attempt in range(TRIES):
            # Late noise may be too small to leave what is known.
            offered = self._episodes(cut, self._weight(number), sigma if attempt < TRIES / 2 else None, rng)
            new = [offer for offer in offered if offer[1] not in self._told]
            if new:
                break
        # An agent that has learned nothing yet has no preference.
        return (new or offered)[0][1] if sigma is None else max(new or offered, key=lambda offer: offer[0])[1]

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.candidate)
        levels = None if trial.duplicate_of is not None else self.environment.levels(trial.candidate)
        if levels is None:
            return
        states, actions = self.environment.walk(trial.candidate.cut, levels)
        rewards = None if trial.measurement is None else tuple(self.reward(trial.measurement, weight) for weight in self.settings.reward_weights)
        self._remember(Episode(trial.candidate.cut, torch.from_numpy(states), torch.from_numpy(actions)[:, None], rewards))
        weight, sigma = self._weight(trial.number), self._sigma(trial.number)
        reward = None if rewards is None else rewards[weight]
        row = {"number": trial.number, "cut": trial.candidate.cut, "weight": self.settings.reward_weights[weight], "reward": reward, "sigma": sigma}
        self.history.append(row)
        if sigma is not None:
            self._learn()

    def reward(self, measurement: Measurement, weight: float) -> float:
        """Accuracy against latency relative to device-only's (METHODS 5.1), less what misses the limits."""
        relative = measurement.total_ms / self._reference_ms
        missed = sum(max(0.0, missed) for missed in self.limits.violations(measurement).values())
        worth = measurement.accuracy - weight * relative if self.settings.reward == "linear" else (measurement.accuracy - 1) * math.log1p(relative)
        return worth - self.settings.penalty * missed

    def _progress(self, number: int) -> float:
        return min(1.0, max(0.0, (number - self._first) / self.trials))

    def _sigma(self, number: int) -> float | None:
        """Of the noise; None in the warm-up, where actions are uniform."""
        settings, progress = self.settings, self._progress(number)
        if progress < settings.warm_up:
            return None
        return float(settings.sigma * (settings.sigma_end / settings.sigma) ** ((progress - settings.warm_up) / (1 - settings.warm_up)))

    def _weight(self, number: int) -> int:
        """Which of the reward weights; it changes once all cuts had their turn."""
        return number // len(self.environment.cuts) % len(self.settings.reward_weights)

    def _shares(self) -> list[float]:
        """The reward weights as the state shows them."""
        return [weight / (max(self.settings.reward_weights) or 1.0) for weight in self.settings.reward_weights]

    def _survivors(self, number: int) -> list[str]:
        """The cuts still searched: successive halving by best reward, all at first; a cut that is best under some weight stays."""
        cuts = self.environment.cuts
        rounds = math.ceil(math.log2(len(cuts))) + 1
        done = min(rounds - 1, int(self._progress(number) * rounds))
        tops = [max(best) for best in zip(*self._best.values(), strict=True)]

        def behind(cut: str) -> float:
            return min(top - mine if mine > -math.inf else math.inf for top, mine in zip(tops, self._best[cut], strict=True)) if cut in self._best else 0.0

        ranked = sorted(cuts, key=behind)
        kept = set(ranked[: math.ceil(len(cuts) / 2**done)]) | {cut for cut in cuts if behind(cut) <= 0}
        return [cut for cut in cuts if cut in kept]

    @torch.no_grad()
    def _episodes(self, cut: str, weight: int, sigma: float | None, rng: np.random.Generator) -> list[tuple[float, Candidate]]:
        """Q of the last step and candidate of `proposals` episodes; actions are mu(s) with noise, or uniform where sigma is None."""
        environments = [copy.copy(self.environment) for _ in range(self.settings.proposals)]
        states = [environment.reset(options={"cut": cut, "weight": self._shares()[weight]})[0] for environment in environments]
        for _ in self.environment.steps[cut]:
            before = torch.from_numpy(np.stack(states))
            means = [] if sigma is None else self.actor(before)[:, 0].tolist()
            wanted = rng.random(len(states)).tolist() if sigma is None else [truncated_normal(mean, sigma, rng) for mean in means]
            taken = [environment.step(np.array([action], np.float32)) for environment, action in zip(environments, wanted, strict=True)]
            states, infos = [step[0] for step in taken], [step[4] for step in taken]
        values = self.critic(before, torch.tensor([[info["action"]] for info in infos]))[:, 0].tolist()
        return [(value, info["candidate"]) for value, info in zip(values, infos, strict=True)]

    def _remember(self, episode: Episode) -> None:
        self._replay.append(episode)
        # a cut where all fails must not stay the most promising one
        rewards = episode.rewards or (-math.inf,) * len(self.settings.reward_weights)
        self._best[episode.cut] = tuple(map(max, self._best.get(episode.cut, rewards), rewards))
        if len(self._replay) > self.settings.replay_episodes:
            elites = {number for numbers in self._elites().values() for number in numbers}
            del self._replay[next((number for number in range(len(self._replay)) if number not in elites), 0)]

    def _elites(self) -> Mapping[tuple[str, int], list[int]]:
        """(cut, weight) -> numbers in replay of its best episodes."""
        of_cut: dict[str, list[tuple[tuple[float, ...], int]]] = {}
        for number, episode in enumerate(self._replay):
            if episode.rewards is not None:
                of_cut.setdefault(episode.cut, []).append((episode.rewards, number))
        return {
            (cut, weight): [number for _, number in sorted(found, key=lambda one: -one[0][weight])[: min(self.settings.elites, -(-len(found) // 2))]]
            for cut, found in of_cut.items()
            for weight in range(len(self.settings.reward_weights))
        }

    def _learn(self) -> None:
        """`updates` steps of Adam each for critic, on (Q(s, a) - reward)^2, and actor, on -Q(s, mu(s)) and its distance to the best episodes."""
        settings, elites = self.settings, self._elites()
        if not elites:
            return  # all failed
        states, actions = torch.cat([episode.states for episode in self._replay]), torch.cat([episode.actions for episode in self._replay])
        lengths = torch.tensor([len(episode.states) for episode in self._replay])
        owner, starts = torch.repeat_interleave(torch.arange(len(lengths)), lengths), lengths.cumsum(0) - lengths
        rewards = self._standardised()
        shares = torch.tensor(self._shares())
        best = torch.tensor([(starts[n] + step, weight) for (_, weight), numbers in elites.items() for n in numbers for step in range(lengths[n])])

        def drawn(count: int) -> Tensor:
            return torch.randint(count, (settings.batch,), generator=self._draws)

        def seen(rows: Tensor, weights: Tensor) -> Tensor:
            batch = states[rows]
            batch[:, self.environment.weight_column] = shares[weights]
            return batch

        for _ in range(settings.updates):
            rows, weights = drawn(len(states)), drawn(len(shares))
            state = seen(rows, weights)
            critic_loss = F.mse_loss(self.critic(state, actions[rows]), rewards[owner[rows], weights, None])
            self._step("critic", self.critic, critic_loss)
            like, under = best[drawn(len(best))].unbind(1)
            imitation = F.mse_loss(self.actor(seen(like, under)), actions[like])
            self._step("actor", self.actor, settings.imitation * imitation - self.critic(state, self.actor(state)).mean())

    def _step(self, name: str, network: nn.Module, loss: Tensor) -> None:
        parameters = list(network.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self._optimisers[name].step()

    def _standardised(self) -> Tensor:
        """Rewards of the replayed episodes, (episodes, weights), mean 0 and deviation 1 under each weight; a failed one counts as the worst."""
        measured = torch.tensor([episode.rewards for episode in self._replay if episode.rewards is not None])
        worst = tuple(measured.min(0).values.tolist())
        rewards = torch.tensor([episode.rewards or worst for episode in self._replay])
        return (rewards - rewards.mean(0)) / rewards.std(0, correction=0).clamp(min=1e-6)


def truncated_normal(mean: float, sigma: float, rng: np.random.Generator) -> float:
    """A draw of the normal distribution given that it lies in [0, 1]."""
    normal = NormalDist(mean, sigma)
    low, high = normal.cdf(0), normal.cdf(1)
    share = min(max(low + (high - low) * rng.random(), 1e-12), 1 - 1e-12)
    return min(1.0, max(0.0, normal.inv_cdf(share)))
