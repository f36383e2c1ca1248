"""`as_peft()`: `import peft` means the shim, for every library, in either order of imports. Each is a process."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, site: Path | None = None) -> str:
    """Run a program, in an environment without the real peft if `site` is given."""
    path = {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"} if site else {}
    command = [sys.executable, *(["-S"] if site else []), "-c", code]
    environment = {**os.environ, **path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def without_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed packages, but for peft."""
    folder = tmp_path_factory.mktemp("site")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name.partition("-")[0] != "peft":
            (folder / entry.name).symlink_to(entry)
    return folder


START = "import funcadapt.peft as p; p.as_peft()\n"

NAMES = """
import copy, importlib.util, pickle, sys
from importlib import metadata
import peft, peft.tuners.lora.layer, peft.utils.other
from peft import LoraConfig, get_peft_config
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners import lora
import peft.config as c
assert peft is p and LoraConfig is p.LoraConfig is c.LoraConfig and c is p.config
assert lora is peft.tuners.lora is sys.modules["peft.tuners.lora"] is sys.modules["funcadapt.peft.tuners.lora"]
assert c.__spec__.name == c.__name__ == "funcadapt.peft.config" and peft.__spec__.name == "funcadapt.peft"
assert lora.layer.__spec__.name == "funcadapt.peft.tuners.lora.layer"
assert importlib.util.find_spec("peft") and importlib.util.find_spec("peft.tuners.lora.layer")
assert importlib.util.find_spec("peft.nothing") is None and importlib.util.find_spec("peft.tuners.nothing") is None
assert metadata.version("peft") == peft.__version__ == metadata.metadata("peft")["Version"] == "0.21.2"
assert metadata.metadata("peft")["Name"] == metadata.distribution("peft").name == "peft"
assert metadata.distribution("peft").read_text("top_level.txt").split() == ["peft"]
assert [d.version for d in metadata.distributions(name="peft")][0] == "0.21.2"
assert any(d.name == "peft" for d in metadata.distributions()) and metadata.version("torch")
assert pickle.loads(pickle.dumps(LoraConfig(r=3))) == p.LoraConfig(r=3)
# what the real peft has pickled
import pickletools
text = pickle.dumps(LoraConfig, 0).replace(b"funcadapt.peft.config", b"peft.tuners.lora.config")
assert pickle.loads(text) is LoraConfig
assert issubclass(lora.layer.Linear, BaseTunerLayer)
before = list(sys.meta_path)
assert p.as_peft() is p and sys.meta_path == before
try:
    from peft import LoraConfg
except ImportError as error:
    assert "Did you mean 'LoraConfig'" in str(error)
else:
    raise AssertionError
assert not [n for n, m in sys.modules.items() if n.startswith("peft") and not m.__name__.startswith("funcadapt.peft")]
print("ok")
"""


def test_names(without_peft: Path) -> None:
    assert run(START + NAMES) == "ok\n"
    assert run(START + NAMES, without_peft) == "ok\n"


def test_the_real_peft_was_imported() -> None:
    code = """
import funcadapt.peft, peft, sys
for name in ("peft", "peft.config"):
    try:
        funcadapt.peft.as_peft()
    except ImportError as error:
        assert "The real peft is imported already" in str(error) and "site-packages" in str(error), error
    else:
        raise AssertionError
    for other in [n for n in sys.modules if n.startswith("peft") and n != "peft.config"]:
        del sys.modules[other]  # half of it is enough
import importlib.metadata
assert not any(type(f).__module__ == "funcadapt.peft.as_peft" for f in sys.meta_path)
print("ok")
"""
    assert run(code) == "ok\n"


def test_without_it_there_is_no_peft(without_peft: Path) -> None:
    code = "import importlib.util, funcadapt.peft as p; print(importlib.util.find_spec('peft'), p.LoraConfig(r=2).r)"
    assert run(code, without_peft) == "None 2\n"


IMPORTS = """
import accelerate.utils, diffusers, transformers, trl
import diffusers.hooks.layerwise_casting, diffusers.loaders.lora_base, diffusers.loaders.lora_pipeline
import diffusers.training_utils, transformers.trainer, trl.trainer.sft_trainer
"""
CHECKS = """
import peft, sys
from accelerate.utils import is_peft_model
from transformers.utils import is_peft_available
from transformers.utils.import_utils import is_peft_greater_or_equal
assert is_peft_available() and is_peft_greater_or_equal("0.21.0") and not is_peft_greater_or_equal("0.22.0")
assert transformers.trainer.PeftModel is transformers.trainer_utils.PeftModel is p.PeftModel
assert diffusers.utils.USE_PEFT_BACKEND is True and diffusers.loaders.lora_base.USE_PEFT_BACKEND is True
assert diffusers.utils.import_utils.is_peft_version(">=", "0.21.2")
assert diffusers.utils.is_peft_available() and diffusers.loaders.lora_pipeline._LOW_CPU_MEM_USAGE_DEFAULT_LORA
assert diffusers.hooks.layerwise_casting.BaseTunerLayer is p.tuners.tuners_utils.BaseTunerLayer
assert diffusers.training_utils.set_peft_model_state_dict is p.set_peft_model_state_dict
module = trl.trainer.sft_trainer
assert module.peft is p and module.PeftConfig is p.PeftConfig and module.get_peft_model is p.get_peft_model
import torch
assert is_peft_model(torch.nn.Linear(1, 1)) is False
from accelerate.utils.imports import is_peft_available
assert is_peft_available()
print("ok")
"""


def test_libraries_imported_after() -> None:
    assert run(START + IMPORTS + CHECKS) == "ok\n"


def test_libraries_imported_before_in_vain(without_peft: Path) -> None:
    """They looked for peft and did not find it; where the real one is installed, as_peft refuses (tested above)."""
    assert run(IMPORTS + START + CHECKS, without_peft) == "ok\n"


def test_libraries_that_have_not_touched_the_real_peft() -> None:
    code = """
import transformers, accelerate
from transformers.utils import is_peft_available
assert is_peft_available()
import sys
assert "peft" not in sys.modules
import funcadapt.peft as p
p.as_peft()
import transformers.trainer
assert transformers.trainer.PeftModel is p.PeftModel
print("ok")
"""
    assert run(code) == "ok\n"
