"""CLIP ViT-B/32, CM3Leon's retrieval encoder (section 2.1), with the published training settings.

    leon train --config=configs/clip_b32.py --workdir=runs/clip_b32 --config.data.folder=FOLDER \
      --config.data.text=runs/text/export/text.json

FOLDER is a documents folder; config.data.mixture takes several. Sizes and optimizer follow arXiv
2103.00020 (tables 19 and 20): 32 epochs of 400M pairs in batches of
32,768. The only augmentation is CLIP's random square crop. A text tokenizer of 49,405 entries
gives CLIP's vocabulary of 49,408.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    steps = 390_625  # 32 epochs
    return ConfigDict(
        {
            "kind": "encoder",
            "seed": 0,
            "steps": steps,
            "batch_size": 32_768,
            "model": {
                "vision": {
                    "image_size": 224,
                    "patch_size": 32,
                    "width": 768,
                    "layers": 12,
                    "heads": 12,
                    "stem": "patch",
                },
                "text": {
                    "context_length": 77,
                    "vocab_size": 0,  # that of the text tokenizer
                    "width": 512,
                    "layers": 12,
                    "heads": 8,
                },
                "embed_dim": 512,
                "activation": "quick_gelu",
                "remat": True,
            },
            "augment": {
                "crop": 0.9,
                "zoom": 0.0,
                "aspect": 0.0,
                "shift": 0.0,
                "mirror": 0.0,
                "blur": 0.0,
                "brightness": 0.0,
                "contrast": 0.0,
                "saturation": 0.0,
                "hue": 0.0,
                "gray": 0.0,
                "close": 0.0,
                "outline": 0.0,
            },
            "optimizer": {
                "learning_rate": 5e-4,
                "warmup_steps": 2000,
                "total_steps": steps,
                "schedule": "cosine",
                "final_fraction": 0.0,
                "beta1": 0.9,
                "beta2": 0.98,
                "eps": 1e-6,
                "weight_decay": 0.2,
            },
            "data": {"folder": "", "text": "runs/text/export/text.json", "threads": 16},
            "loop": {},
        }
    )
