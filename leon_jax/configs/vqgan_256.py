"""CM3Leon's image tokenizer: 256 px images as 32 x 32 codes out of 8,192.

    leon train --config=configs/vqgan_256.py --workdir=runs/vqgan_256 --config.data.folder=FOLDER

FOLDER is a documents folder; config.data.mixture takes several.

The geometry is that of Make-A-Scene (Gafni et al. 2022), which CM3Leon used; the network and the
losses are taming-transformers' f8 configuration (channels 128, multipliers 1, 1, 2, 4, attention at
32 x 32, VGG16 LPIPS, hinge PatchGAN at weight 0.8). Make-A-Scene's extra losses on faces and
objects need annotations and are left out. Learning rate: taming's 4.5e-6 per image of the batch.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    steps, batch_size = 800_000, 192
    return ConfigDict(
        {
            "kind": "tokenizer",
            "seed": 0,
            "steps": steps,
            "batch_size": batch_size,
            "model": {
                "resolution": 256,
                "channels": 128,
                "multipliers": (1, 1, 2, 4),
                "blocks": 2,
                "attention_sizes": (32,),
                "groups": 32,
                "latent": 256,
                "code_dim": 256,
                "codes": 8192,
            },
            "losses": {
                "network": "vgg16",
                "adversarial": 0.8,
                "adversarial_start": 50_000,
                "discriminator_channels": 64,
                "discriminator_layers": 3,
                "revive_after": 1000,
            },
            "optimizer": {
                "learning_rate": 4.5e-6 * batch_size,
                "warmup_steps": 5_000,
                "total_steps": steps,
                "schedule": "constant",
                "beta1": 0.5,
                "beta2": 0.9,
                "weight_decay": 0.0,
            },
            "augment": {"crop": 0.75, "mirror": 0.5},
            "data": {"folder": "", "threads": 16},
            "loop": {},
        }
    )
