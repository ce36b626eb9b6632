"""Open-Sora 1.0: copy to configs/opensora/train/."""

_base_ = ["16x256x256.py"]
custom_imports = dict(imports=["speedit_plugins.hosts.open_sora"], allow_failed_imports=False)
scheduler = dict(_delete_=True, type="SpeeDiffusion", policy=dict(type="speedit"), timestep_respacing="")
