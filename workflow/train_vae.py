"""Train the variational auto-encoder whose weights chapters load, and keep both networks.

    python workflow/train_vae.py --epochs 150

Decoder of the book (32 latents, 311,861 parameters), mirrored Gaussian encoder, negative evidence
lower bound with the analytic divergence and one reparameterised sample, dynamic binarisation, Adam
at 1e-3 with cosine decay, 60,000 training images. Stopped at any moment, the same command goes on
from the last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from amortised import data, results
from amortised.encoders import GaussianEncoder
from amortised.models import ConvBernoulli
from amortised.objectives import elbo
from amortised.training import cosine_decay, fit, gradient_step

MODELS = Path(__file__).resolve().parents[1] / "data/models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150, help="passes over the training set")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=MODELS / "reference", help="folder")
    parser.add_argument("--name", default="vae-laptop", help="row and scale, for the file names")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/vae.safetensors"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.time()

    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        decoder, encoder = ConvBernoulli().to(options.device), GaussianEncoder().to(options.device)
        for network in (decoder, encoder):
            network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(
            [*decoder.parameters(), *encoder.parameters()], lr=options.learning_rate
        )
        levels = data.load_mnist("train", dtype=torch.uint8).images.to(options.device)
        num_steps = options.epochs * (len(levels) // options.batch_size)
        scheduler = cosine_decay(optimizer, num_steps)

        def loss(batch: torch.Tensor) -> torch.Tensor:
            x = data.binarise(batch)
            return -elbo(decoder, encoder(x), x, analytic_kl=True)

        config = {
            "model": "ConvBernoulli(32)",
            "encoder": "GaussianEncoder(32)",
            "objective": "elbo, analytic divergence, 1 sample",
            "binarisation": "dynamic",
            "optimiser": "Adam, cosine decay to 0",
            "learning_rate": options.learning_rate,
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "seed": options.seed,
        }
        options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        run = fit(
            gradient_step(loss, optimizer, scheduler),
            levels,
            epochs=options.epochs,
            batch_size=options.batch_size,
            state={
                "decoder": decoder,
                "encoder": encoder,
                "optimizer": optimizer,
                "scheduler": scheduler,
            },
            generator=torch.Generator().manual_seed(options.seed),
            checkpoint=options.checkpoint,
            config=config,
        )

    final_loss = run.epoch_means("loss")[-1].item()
    details = {
        "config": config,
        "config_hash": results.config_hash(config),
        "training_loss_last_epoch": final_loss,
        "provenance": results.provenance(
            options.device, started=started, wall_seconds=run.seconds, datasets=("mnist",)
        ),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for role, network in (("decoder", decoder), ("encoder", encoder)):
        path = options.output / f"{options.name}-seed{options.seed}-{role}.safetensors"
        architecture = {"class": type(network).__name__, "latent_dim": 32}
        results.save_weights(path, network, architecture, details)
        print(f"{path}: training loss {final_loss:.2f} nats in the last epoch")


if __name__ == "__main__":
    main()
