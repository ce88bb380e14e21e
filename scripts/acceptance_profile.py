"""Watch a method decode a task, and print what stood as a profile of conf/accept.

    python -m scripts.acceptance_profile lab_eagle2 method=eagle2 > conf/accept/lab_eagle2.yaml

The first word names the profile, the others are those of `specquant run`. Replay it with the
same method: it says which child of a node stands, where a node has children. Tokens per step follow
from the trees, and replayed text, which is nobody's, shapes others; accept=constant meets a
given number.
"""

import sys
from dataclasses import replace

import yaml
from hydra import compose, initialize_config_dir

from bench.acceptance import attempt
from bench.build import ROOT
from bench.config import parse, resolve
from bench.load import Loader, context_of
from bench.task import encode, load
from bench.trace import Watched


def main(name: str, overrides: list[str]) -> str:
    """Decode every prompt that fits; give the yaml."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(resolve(compose("run", overrides=overrides)))
    loader = Loader(config)
    parts = loader.parts(config)
    watched = Watched(parts.rule)
    method = config.recipe.method(replace(parts, rule=watched))
    room = context_of(config.settings, loader.target) - config.task.max_new_tokens
    for prompt in load(config.task):
        tokens = encode(loader.tokenizer, config.task, prompt, [])
        if len(tokens) <= room:
            attempt(method, tokens, config.task.max_new_tokens)
    words = " ".join(overrides)
    profile = watched.profile(name, f"measured: {words}")
    head = f"# Replay what was measured by: {words}\n#   specquant run accept={name} {words}\n"
    return head + yaml.safe_dump(profile, sort_keys=False, default_flow_style=None, width=100)


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1], sys.argv[2:]))
