"""A training with imagen-pytorch's ImagenTrainer, as the host's README shows it, with and without a policy.

python imagen_script.py IMAGES RESULTS --steps 100 [--policy speedit] [--resume RESULTS/trainer.pt]
"""

import argparse
from pathlib import Path

import torch
from imagen_pytorch import Imagen, ImagenTrainer, Unet
from imagen_pytorch.data import Dataset

from speedit_plugins import load_policy_state, policy_state, with_policy


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--policy")
    parser.add_argument("--resume")
    args = parser.parse_args()
    args.results.mkdir(exist_ok=True)
    torch.manual_seed(0)
    unet = Unet(dim=16, dim_mults=(1, 2), num_resnet_blocks=1, layer_attns=False, layer_cross_attns=False)
    imagen = Imagen(
        unets=unet, image_sizes=16, timesteps=8, condition_on_text=False, min_snr_loss_weight=False
    )
    if args.policy:
        imagen = with_policy(imagen, policy=args.policy)
    trainer = ImagenTrainer(imagen=imagen, split_valid_from_train=True, split_valid_fraction=0.25)
    trainer.add_train_dataset(Dataset(args.images, image_size=16), batch_size=16)
    done = 0
    if args.resume:
        loaded = trainer.load(args.resume)
        load_policy_state(imagen, loaded["speedit"])
        done = trainer.num_steps_taken(1)
        print(f"resumed after {done} steps")
    for step in range(done, args.steps):
        loss = trainer.train_step(unet_number=1)
        print(f"step {step} loss {loss}")
        if step == args.steps // 2:
            print(f"valid loss {trainer.valid_step(unet_number=1)}")
    saved = {"speedit": policy_state(imagen)} if args.policy else {}
    trainer.save(str(args.results / "trainer.pt"), **saved)
    torch.manual_seed(1)
    for number, picture in enumerate(trainer.sample(batch_size=2, return_pil_images=True, use_tqdm=False)):
        picture.save(args.results / f"{number}.png")


if __name__ == "__main__":
    main()
