"""The typed, frozen schema of a run and of the bundle it makes.

Knows nothing of the other rooms, of torch, or of any I/O beyond reading YAML.
"""

from configs.errors import ConfigError
from configs.loading import load_config, preset_path
from configs.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "load_config", "preset_path"]
