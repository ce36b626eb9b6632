"""Open-Sora 1.1 and 1.2, and the same scheduler in 1.3: copy to configs/opensora-v1-1/train/."""

_base_ = ["stage1.py"]
custom_imports = dict(imports=["speedit_plugins.hosts.open_sora"], allow_failed_imports=False)
scheduler = dict(_delete_=True, type="SpeeDiffusion", policy=dict(type="speedit"), timestep_respacing="")
