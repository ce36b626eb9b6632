"""ADM of ImageNet 64x64 with SpeeD: copy to mmagic's configs/guided_diffusion/."""

_base_ = ["./adm_ddim250_8xb32_imagenet-64x64.py"]
custom_imports = dict(imports=["speedit_plugins.hosts.mmagic"], allow_failed_imports=False)

import mmagic.models  # noqa: E402 - with _base_ after an import, mmengine reads a config as another kind

# mmagic 1.2's train_step reads two names that neither it nor mmengine defines.
mmagic.models.AblatedDiffusionModel._parse_losses = mmagic.models.AblatedDiffusionModel.parse_losses
mmagic.models.AblatedDiffusionModel.with_ema_denoising = False

model = dict(
    # train_step passes no labels, and mmagic has no loss for a learned variance.
    unet=dict(num_classes=0, output_cfg=dict(mean="eps", var="fixed")),
    diffusion_scheduler=dict(
        _delete_=True,
        type="SpeeDiffusion",
        policy=dict(type="speedit"),
        variance_type="fixed_small",
        beta_schedule="squaredcos_cap_v2",
    ),
)
# The host's pipeline loads the image as "gt" and packs it nowhere.
train_pipeline = [
    dict(type="LoadImageFromFile", key="gt"),
    dict(type="RandomCropLongEdge", keys="gt"),
    dict(type="Resize", scale=(64, 64), keys="gt", backend="pillow"),
    dict(type="Flip", keys="gt", flip_ratio=0.5, direction="horizontal"),
    dict(type="PackInputs", keys="gt"),
]
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=train_pipeline))
# The key is the one that train_step looks up.
optim_wrapper = dict(
    denoising=dict(type="OptimWrapper", modules="unet", optimizer=dict(type="AdamW", lr=1e-4))
)
