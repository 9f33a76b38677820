"""Settings: pydantic blocks that describe every file a user writes, and the loader that reads them.

In: a YAML file and `a.b=c` overrides. Out: frozen settings, or one `ConfigError` that names the setting.
Nothing here starts anything or imports torch, ray or vllm.
Start reading at `run.py`, the settings of an online run; `loader.py` turns a file into them, `commands.py` says which
command reads which settings, and `settings_page.py` prints every setting for people.
"""
