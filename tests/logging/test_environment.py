import json
import platform
import socket
from pathlib import Path

import PIL
import torch

from speedit_plugins.trainer.logging.environment import save_environment, versions
from speedit_plugins.trainer.parallel.runtime import Runtime


def test_the_environment_has_versions_and_devices_and_no_name_of_the_host(tmp_path: Path) -> None:
    save_environment(tmp_path, Runtime())
    text = (tmp_path / "environment.json").read_text()
    found = json.loads(text)
    assert found["torch"].startswith(torch.__version__.partition("+")[0])
    # Recorded because another decoder may read other pixels.
    assert found["pillow"] == PIL.__version__
    assert found["python"] == platform.python_version()
    assert found["processes"] == "1"
    assert all(isinstance(value, str) for value in found.values())
    assert socket.gethostname() not in text


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert list(versions(("torch", "no-such-package", "numpy"))) == ["torch", "numpy"]
