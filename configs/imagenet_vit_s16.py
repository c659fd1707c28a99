"""ImageNet-1k with a ViT-S/16: the "better plain ViT baseline" of Beyer et al. 2022 (arXiv:2205.01580), 90 epochs.

    python launch.py --config=configs/imagenet_vit_s16.py --config.data.source.data_dir=DIR
    python launch.py --config=configs/imagenet_vit_s16.py:epochs=300

The paper reports 76.5 % top-1 on the validation images after 90 epochs (table 1)
RESULT
"""
