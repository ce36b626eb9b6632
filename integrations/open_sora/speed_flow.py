"""Open-Sora 1.2 and 1.3, rectified flow: copy to configs/opensora-v1-2/train/ or .../opensora-v1-3/train/.

Without `_delete_` the host's own options of `rflow` stay: its logit-normal draw and its resolution shift.
"""

_base_ = ["stage1.py"]
custom_imports = dict(imports=["speedit_plugins.hosts.open_sora"], allow_failed_imports=False)
scheduler = dict(type="SpeeDFlow", k=5.0)
