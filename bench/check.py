"""What is looked at before any compute: checkpoints, vocabularies, calibration text, prompts."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from bench import energy, sandbox, text
from bench.build import ROOT
from bench.config import LAB, RANDOM, Config, Costing
from bench.draft_vocab import check_unseen, vocabulary
from bench.identity import WeightHashes
from bench.task import Prompt, Task, encode
from methods.checkpoint import check_transformer, stored_in
from methods.random_weights import is_random
from methods.weights import Weights, read_config


def check_target(folder: Path, context: int | None) -> int:
    """Check the target's folder, and that a context is within it; give its positions."""
    shape = check_transformer(folder)
    if not is_random(folder) and not any(folder.glob("tokenizer*")):
        raise ValueError(f"{folder} must hold a tokenizer, found none")
    if context is not None and context > shape.max_positions:
        raise ValueError(
            f"context must be within the model's {shape.max_positions} positions, got {context}"
        )
    return shape.max_positions


def check_random(config: Config) -> None:
    """Check that a model says so where its weights are random, and is asked for costs alone.

    One part is enough to call all of it random.
    """
    model = config.model
    parts, family = [], model.family
    while True:
        parts += [family.target, *family.heads.values()]
        if family.small is None:
            break
        family = family.small
    made_up = next(filter(is_random, parts), None)
    if (made_up is not None) != (model.weights == RANDOM):
        told = "nothing of it is" if made_up is None else f"{made_up} is"
        raise ValueError(
            f"model.weights must be {RANDOM} where weights are random, and there alone, got "
            f"{model.weights}: {told}"
        )
    if not is_random(model.family.target):
        return
    if config.quality is not None:
        raise ValueError("quality must be of a model that was trained, got random weights")
    vocab = check_transformer(model.family.target).vocab_size
    task = config.task
    if task.draw_lengths is None or (task.draw_below or 0) > vocab:
        raise ValueError(
            f"task must draw tokens below {vocab}, such as task=random, for random weights, which "
            f"have no tokenizer; got {task.name} with draw_below {task.draw_below}"
        )


def is_foreign(config: Config, hashes: WeightHashes | None = None) -> bool:
    """Tell whether weights are called the lab's that nothing shows to be.

    The lab's lie below models/lab, or config.json tells that `specquant quantize` made them of
    those. hashes: that may know files already.
    """
    folder, lab = config.model.family.target.resolve(), (ROOT / "models" / LAB).resolve()
    if config.model.weights != LAB or folder.is_relative_to(lab):
        return False
    told = read_config(folder)
    notes = (told.get("quantization_config"), told.get("specquant"))
    source = next((n["source"] for n in notes if isinstance(n, dict) and "source" in n), None)
    hashes = hashes or WeightHashes(None)
    return source not in [hashes.one(place.parent) for place in lab.glob("*/config.json")]


def check_cost(config: Config, positions: int) -> None:
    """Check that what the cost door times fits the model, and that energy can be had if asked."""
    assert config.cost is not None
    check_contexts(config.cost, positions)
    longest, context = max(config.cost.contexts), config.settings.context
    if context is not None and longest > context:
        raise ValueError(f"cost.contexts must be within context={context}, got {longest}")
    if config.cost.hold_s:
        energy.check(config.settings.device)


def check_contexts(cost: Costing, positions: int) -> None:
    """Check that every context and the tree after it lie within the model's positions."""
    if (needed := max(cost.contexts) + max(cost.widths)) > positions:
        raise ValueError(
            f"cost.contexts and cost.widths must be within the model's {positions} positions "
            f"together, got {needed}"
        )


def check_quality(config: Config, positions: int) -> None:
    """Check that a window lies within the model's positions, and the dense model beside it."""
    evaluation, target = config.quality, config.model.family.target
    assert evaluation is not None
    if config.settings.exact:
        raise ValueError("exact must be false for quality, which reads a window at once, got true")
    check_window(evaluation.window, positions)
    if not evaluation.kl:
        return
    if evaluation.reference is None and config.schemes.target.as_stored:
        stored = stored_in(target, config.schemes.target, config.schemes.lm_head)
        raise ValueError(
            "quality.reference must be the folder of the dense model that the target was "
            f"quantised from, or quality.kl false, got null: {target} holds {stored.label}"
        )
    try:
        shape = check_transformer(config.reference)
        stored_in(config.reference, config.schemes.dense, config.schemes.dense)
    except ValueError as error:
        raise ValueError(
            f"quality.reference must be a dense checkpoint, or quality.kl false: {error}"
        ) from error
    if evaluation.window > shape.max_positions:
        raise ValueError(
            f"quality.window must be within {config.reference}'s {shape.max_positions} positions, "
            f"got {evaluation.window}"
        )
    if config.reference == target:
        return
    sizes = [read_config(folder).get("vocab_size") for folder in (config.reference, target)]
    if sizes[0] != sizes[1] or vocabulary(config.reference) not in (None, vocabulary(target)):
        raise ValueError(f"{config.reference}: the vocabulary must be that of {target}")


def check_window(window: int, positions: int) -> None:
    """Check that a window of text lies within the model's positions."""
    if window > positions:
        raise ValueError(
            f"quality.window must be within the model's {positions} positions, got {window}"
        )


def check_text(config: Config) -> None:
    """Check that a tokenizer makes two tokens or more of the text."""
    from bench.load import load_tokenizer  # transformers takes seconds, a finished sweep none

    folder = config.model.family.target
    limit = None if config.quality is None else config.quality.limit
    check_ids(folder, text.encode(load_tokenizer(folder), config.text)[:limit])


def check_ids(folder: Path, ids: Iterable[int]) -> None:
    """Check that a folder's tokenizer gave no token that its model has no embedding for."""
    vocab = check_transformer(folder).vocab_size
    if (most := max(ids, default=0)) >= vocab:
        raise ValueError(
            f"{folder}: the tokenizer must give ids below vocab_size={vocab} for the text that is "
            f"read, got {most}"
        )


def check_sandbox(config: Config) -> None:
    """Check that programs can be shut in, where a cell would run some."""
    if config.runs_programs:
        sandbox.check()


def check_files(config: Config, folders: Sequence[Path]) -> None:
    """Check that draft heads, smaller models and a list of tokens are there and whole."""
    for folder in folders:
        read_config(folder)
        Weights(folder)
    if folders and (ranking := config.draft_vocab.read()) is not None:
        check_unseen(ranking, config.source)


def check_calibration(config: Config, *, drafts: bool) -> bool:
    """Tell whether a cell's schemes look at activations; then there must be text."""
    own = config.schemes
    schemes = [own.target, own.lm_head]
    if drafts:
        schemes += [own.draft, *filter(None, [own.draft_lm_head])]
    asking = [scheme.label for scheme in schemes if scheme.needs_absmax]
    text = config.model.calibration
    if config.model.weights == RANDOM:
        return False  # a stated constant stands for what calibration would find
    if asking and (text is None or not text.is_file()):
        raise ValueError(f"model.calibration must be a file for {asking[0]}, got {text}")
    return bool(asking)


def check_method(config: Config, folders: Sequence[Path]) -> None:
    """Check a method's settings and sizes, and the tokens that it may draft, or raise ValueError.

    folders: of the method; where there are none nothing drafts.
    """
    ids, own = config.draft_ids if folders else None, config.schemes
    config.recipe.check(config.model.family, draft_ids=ids)
    if ids is not None and own.draft_lm_head is None and own.lm_head.needs_absmax:
        raise ValueError(
            "method.draft_lm_head must be given where draft_vocab is and quant.lm_head is "
            f"{own.lm_head.label}, which cannot be had for some tokens alone"
        )


def check_fit(config: Config, folders: Sequence[Path]) -> None:
    """Check that a method fits the model, token for token, or raise ValueError."""
    family = config.model.family
    check_method(config, folders)
    asking = [s for s in (config.schemes.draft, config.schemes.draft_lm_head) if s]
    if any(s.needs_absmax for s in asking) and any(vocabulary(f) is None for f in folders):
        raise ValueError("draft heads cannot be calibrated: draft schemes must not need it")
    schemes = config.schemes
    for folder in folders:
        if vocabulary(folder) is not None:  # a smaller model, not a head
            stored_in(folder, schemes.draft, schemes.draft_lm_head or schemes.dense)
        if vocabulary(folder) not in (None, vocabulary(family.target)):
            raise ValueError(f"{folder}: the vocabulary must be that of {family.target}")


def prompt_lengths(task: Task, folder: Path, prompts: Sequence[Prompt]) -> list[int]:
    """Tokens of every prompt's first turn; ValueError where the model lacks one of them.

    folder: of the target, for its tokenizer.
    """
    if is_random(folder) and task.form == "plain":  # a token's text is its number
        return [len(prompt.turns[0].split()) for prompt in prompts]
    from bench.load import load_tokenizer  # transformers takes seconds, a finished sweep none

    tokenizer = load_tokenizer(folder)
    encoded = [encode(tokenizer, task, prompt, []) for prompt in prompts]
    check_ids(folder, chain.from_iterable(encoded))
    return [len(tokens) for tokens in encoded]


def check_prompts(task: Task, lengths: Sequence[int], context: int) -> int:
    """Count prompts that cannot be answered within the context; ValueError where none can."""
    too_long = [n for n in lengths if n + task.max_new_tokens > context]
    if len(too_long) == len(lengths):
        raise ValueError(
            f"task {task.name}: a prompt and its {task.max_new_tokens} new tokens must be within "
            f"the context of {context}, got {min(too_long)} tokens in the shortest prompt"
        )
    return len(too_long)


def beyond_heads(folders: Sequence[Path], longest: int) -> list[str]:
    """Note the draft heads whose config names fewer positions than a task may reach.

    It is no limit here: a cache has the angles of every position that it has a slot for.
    """
    notes = []
    for folder in folders:
        config = read_config(folder)
        layer = config.get("transformer_layer_config") or config
        limit = layer.get("max_position_embeddings")
        if vocabulary(folder) is None and isinstance(limit, int) and limit < longest:
            notes.append(
                f"{folder}: the head's max_position_embeddings is {limit}, the task reaches "
                f"{longest} tokens; heads draft on beyond it, but were not trained there"
            )
    return notes


def other_special_ids(folders: Sequence[Path], target: Path) -> list[str]:
    """Note the smaller models whose special tokens have other ids than the target's."""
    own = read_config(target)
    return [
        f"{folder}: {key} is {config.get(key)}, the target's {own.get(key)}"
        for folder, config in ((f, read_config(f)) for f in folders if vocabulary(f) is not None)
        for key in ("bos_token_id", "eos_token_id")
        if config.get(key) != own.get(key)
    ]


def references(config: Config) -> list[Path]:
    """The dense model that a target is held against, where it is."""
    return [config.reference] if config.quality is not None and config.quality.kl else []


def files_read(config: Config, *, drafts: bool) -> list[Path]:
    """What a cell reads besides checkpoints and its task."""
    text, listed = config.model.calibration, config.draft_vocab.file
    calibrated = check_calibration(config, drafts=drafts)
    files = (text if calibrated else None, listed if drafts else None)
    return [file for file in files if file is not None]
