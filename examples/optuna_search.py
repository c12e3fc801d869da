"""Search NAMO-D's learning rate and clamp with Optuna, on the quickstart's GPT-2; bad trials end early.

    pip install optuna
    python examples/optuna_search.py --trials 12 --steps 320

Optuna is no dependency of the package, so no test runs this: eight trials of 30 steps were run by hand (Optuna 5.0).
"""

import argparse
from functools import partial

import lightning.pytorch as pl
import optuna

from lightning_namo import NAMOD, OptimizerCallback, WarmupStableDecay
from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.module import GPT2Module


class Pruning(pl.Callback):
    """Ends a trial whose validation loss is bad for its step. Optuna's own callback counts epochs; this run has one."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the loss."""
        self.trial.report(trainer.callback_metrics["val/loss"].item(), trainer.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def objective(trial: optuna.Trial, steps: int, accelerator: str) -> float:
    lr = trial.suggest_float("lr", 0.002, 0.1, log=True)
    clamp = trial.suggest_float("clamp", 0.05, 1.0)
    pl.seed_everything(0, verbose=False)
    data = TextDataModule(block_size=128, batch_size=16)
    model = GPT2Module(vocab_size=data.vocab_size, block_size=128, n_layer=4, n_head=4, n_embd=128)
    optimizer = partial(NAMOD, lr=lr, clamp=clamp, weight_decay=0.1)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=steps,
        val_check_interval=max(1, steps // 5),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[OptimizerCallback(optimizer, WarmupStableDecay(warmup=0.05, decay=0.3)), Pruning(trial)],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, data)
    return trainer.callback_metrics["val/loss"].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--accelerator", default="auto")
    args = parser.parse_args()
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
    study.optimize(partial(objective, steps=args.steps, accelerator=args.accelerator), n_trials=args.trials)
    print(f"validation loss {study.best_value:.4f} with {study.best_params}")


if __name__ == "__main__":
    main()
