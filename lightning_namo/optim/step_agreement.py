"""What all ranks must agree on in a step: gradients that can be used, hyper-parameters, gradients of replicas.

Each rank writes a few numbers into the all-reduce of the statistics. Their sums tell, on all ranks alike, whether some
rank differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_namo.checkpoint.reading import first_few
from lightning_namo.routing.names import parameter_label
from lightning_namo.sharding.agreement import (
    CLOSE,
    Alarm,
    HyperParameters,
    check_hyper_parameters,
    check_order,
    fingerprint,
    plain,
)
from lightning_namo.sharding.exchange import Exchange
from lightning_namo.sharding.process_group import gather


class StepAgreement:
    """Writes the numbers of this rank, reads the sums over all, and raises on all ranks where they differ.

    Args:
        exchange: Of the optimizer.
        names: Of the parameters whose gradients are compared: the matrices in the order of the batches, then AdamW's.
        module: Gives the module of the parameters, for messages: a weak reference, so that it keeps nothing alive.
    """

    def __init__(self, exchange: Exchange, names: Sequence[str], module: Callable[[], nn.Module | None]) -> None:
        self._exchange, self._names, self._module = exchange, names, module
        self.alarm = Alarm(exchange.device)
        self._hyper: HyperParameters = []  # of the step that the alarm is of

    def numbers(self, hyper: HyperParameters, refusal: Exception | None, largest: Sequence[Tensor]) -> list[Tensor]:
        """Numbers to be summed over the ranks: see `check`.

        Args:
            hyper: Hyper-parameters of this step.
            refusal: Why this rank cannot use its gradients.
            largest: The largest element of the local gradient of each AdamW parameter, ().
        """
        exchange = self._exchange
        self._hyper = [
            (name, {key: value.clone() if isinstance(value, Tensor) else value for key, value in of_group.items()})
            for name, of_group in hyper
        ]
        tensors = [v for _, of_group in self._hyper for v in of_group.values() if isinstance(v, Tensor)]
        columns = torch.zeros(2 + len(tensors), exchange.world_size, device=exchange.device)  # each rank fills its own
        own = columns.unbind(dim=1)[exchange.rank]
        own[0].fill_(fingerprint(exchange.number, self._hyper))
        own[1].fill_(refusal is not None)
        for place, value in enumerate(tensors, start=2):
            own[place].copy_(value)
        if not exchange.has_replicas:
            return [columns]
        stacked = torch.stack(list(largest)).double() if largest else exchange.weights_of_adamw
        return [columns, stacked, stacked * exchange.weights_of_adamw]

    def check(
        self,
        sums: Sequence[Tensor],
        differing: Sequence[Tensor],
        presence: Sequence[Tensor],
        refusal: Exception | None,
    ) -> None:
        """Find out from the sums whether the ranks differ; on a CPU raise at once, else in `raise_disagreement`.

        Args:
            sums: Of `numbers`, over the ranks.
            differing: Which matrices have other gradients on other replicas, batch by batch.
            presence: Of `AdamWStep.presence`, summed over the ranks.
            refusal: As given to `numbers`.
        """
        columns, *largest = sums
        spread, magnitude = columns.amax(dim=1) - columns.amin(dim=1), columns.abs().amax(dim=1)
        hyper = (spread[0] > 0) | (spread[2:] > CLOSE * magnitude[2:]).any()
        flags = [hyper, columns[1] > 0, *differing]
        if largest and presence:
            total, difference = largest
            everywhere = ~torch.cat([(found > 0).all(dim=0) for found in presence])
            flags.append(everywhere & (difference.abs() > self._exchange.tolerance_of_adamw * total))
        self.alarm.set(torch.cat([flag.flatten().float() for flag in flags]))
        if self.alarm.at_once:
            self.raise_disagreement(refusal)

    def raise_disagreement(self, refusal: Exception | None) -> None:
        """Raise, on all ranks, if the ranks differed in the sums that were checked last.

        Raises:
            RuntimeError: A rank refused its gradients, or the gradients of replicas differ.
            ValueError: Hyper-parameters differ.
        """
        flags, exchange = self.alarm.read(), self._exchange
        if not any(flags):
            return
        different, refused, differing = flags[0], flags[1:][: exchange.world_size], flags[1 + exchange.world_size :]
        if any(refused):
            rank, reason = refused.index(1.0), "Its own message says why."
            if self.alarm.at_once:
                reason = gather(str(refusal or ""), "tell what they cannot use")[rank]
            raise refusal or RuntimeError(
                f"Expected all ranks to have gradients, but rank {rank} refused its own. {reason}"
            )
        if different:
            told = gather((exchange.number, plain(self._hyper)), "compare their hyper-parameters")
            check_order([number == told[0][0] for number, _ in told])
            check_hyper_parameters([hyper for _, hyper in told])
        if any(differing):
            named = zip(self._names, differing, strict=True)
            names = [parameter_label(name, self._module()) for name, flag in named if flag]
            raise RuntimeError(
                f"Expected the replicas of {first_few(names)} to have the same gradient, but their norms differ by "
                "more than a reduction rounds: one rank's gradient would count, the others' would be lost. Average the "
                "gradients over the ranks before the step (DistributedDataParallel and FSDP do). Local SGD, model "
                "averaging and communication hooks that do not average are not supported."
            )
