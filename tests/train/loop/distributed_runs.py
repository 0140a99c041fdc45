"""What each of several processes does for test_distributed.py: ``torchrun distributed_runs.py IMAGES OUT``."""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from tests.support.fitting import CONFIG, Stop, numbers, train, trained

SHARED = dataclasses.replace(CONFIG, epochs=3, ema_decay=0.6, tensorboard=False)
"""24 training images: 3 steps of 8 images, 2 updates an epoch."""

ONE_PROCESS = dataclasses.replace(SHARED, batch_size=8)

TWO_PROCESSES = {
    "ddp": dataclasses.replace(SHARED, batch_size=4),
    "fsdp": dataclasses.replace(SHARED, batch_size=4, fsdp=True, activation_checkpointing=True),
}


def main(images: Path, out: Path) -> None:
    """Trains once straight, once stopped and resumed; writes ``out/NAME.json`` and ``NAME.pt`` of each."""
    torch.set_num_threads(1)
    for name, config in TWO_PROCESSES.items():
        model, result = train(images, out / f"{name} straight", config)
        write(out, f"{name}-straight", model, result)
        try:
            train(images, out / f"{name} stopped", config, reads=12 + 9)
        except Stop:
            write(out, f"{name}-resumed", *train(images, out / f"{name} stopped", config, resume=True))
    torch.distributed.destroy_process_group()


def write(out: Path, name: str, model: torch.nn.Module, result) -> None:
    """What the test compares; by the main process."""
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        logits = model.eval()(images)  # plain again: any process can use it alone
    if torch.distributed.get_rank() == 0:
        torch.save({"trained": trained(model), "logits": logits}, out / f"{name}.pt")
        document = {
            "history": numbers(result),
            "best_epoch": result.best_epoch,
            "count": result.best.count,
            "exchanged": result.exchanged,
            "trained_bytes": sum(tensor.nbytes for tensor in trained(model).values()),
            "all_bytes": sum(p.nbytes for p in model.parameters()),
        }
        (out / f"{name}.json").write_text(json.dumps(document))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
