# SPDX-License-Identifier: AGPL-3.0-or-later

"""Making a model again from its record: the same inputs are asked for, and what is another one is named."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from rich.markup import escape
from safetensors import SafetensorError

from ..builtin import model_name
from ..directions.sources import DirectionSources
from ..errors import ContrastError, one_line, warn
from ..identity import OF_THE_MODEL, differences, versions
from ..prompts import prompts_digest
from ..settings import PromptSource, validation_error
from .loading import ChatModel, LoadedContext, open_model
from .model_folder import replaced_as_a_whole
from .record import COMPUTING, OF_DIRECTIONS, OF_HERETIC, OF_THE_SEARCH, Made, Record
from .settings import POOLS, HostSettings
from .surface import HAS_PLUGIN_SURFACE, log

if TYPE_CHECKING:
    from ..modifier import ContrastAbliteration


class RecordedSettings(HostSettings):
    """Settings that come from a record alone: no command line, environment or `config.toml` has a say in them."""

    # Heretic 2.0 keeps tables of plugins among what it does not know, and a plugin looks at `config.toml` where it does.
    model_config = SettingsConfigDict(extra="forbid")

    @property
    def contrast_setting(self) -> str:
        return "--"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        *sources: PydanticBaseSettingsSource,
        **named: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (named["init_settings"],)


def prepare(record: Record, given: Any) -> tuple[RecordedSettings, DirectionSources]:
    """Returns settings and inputs, at places `given` or recorded. Raises `ContrastError` when something is gone, or another one."""

    places = {}
    for name in ("model", "directions", *POOLS):
        place, recorded = getattr(given, name), record.places.get(name)
        if isinstance(place, PromptSource) and isinstance(recorded, dict):
            # It has moved, with its columns and whatever stands around its prompts.
            place = {**recorded, **place.model_dump(exclude_unset=True)}
        places[name] = recorded if place is None else place
    model = places.pop("model", None)
    if not isinstance(model, str):
        raise ContrastError("The record does not say where the original model is: give --model.")
    is_path = os.path.isabs(model) or model.startswith((".", "~")) or model.count("/") > 1
    if is_path and not os.path.isdir(model):
        raise ContrastError(
            f"The original model {model} of the record is gone: give its place with --model."
        )
    # A record may come from a stranger: it decides neither what is written elsewhere nor what else is loaded.
    file, without_effect = places["directions"], OF_THE_SEARCH
    if file is not None:
        if not isinstance(file, str) or not os.path.isfile(file):
            raise ContrastError(
                f"The directions file {file} is gone: give its place with --directions."
            )
        needless = [name for name in POOLS if getattr(given, name) is not None]
        if needless:
            raise ContrastError(
                f"The directions are read from {file}, so that no prompts are needed: leave "
                f"--{needless[0].replace('_', '-')} out, or make the model from prompts with run."
            )
        places = {"directions": file}
        without_effect = OF_THE_SEARCH | OF_DIRECTIONS
    kept = {name: value for name, value in record.contrast.items() if name not in without_effect}
    known = {name: value for name, value in record.settings.items() if name in OF_HERETIC}
    try:
        settings = RecordedSettings(
            **known,
            model=model,
            contrast={**kept, **places},
            export_strategy=record.export_strategy,
        )
    except ValidationError as error:
        where = error.errors()[0]["loc"]
        if where[:1] == ("contrast",) and not set(where[1:2]).isdisjoint(places):
            # These may be edited.
            raise validation_error(error, "the record", skip=1) from error
        name = ".".join(map(str, where))
        raise ContrastError(
            f'The record holds a setting that does not work here ("{name}"): take that of the model again.'
        ) from error
    sources = DirectionSources({"": settings.contrast}, "", settings.contrast_setting)
    for directions in sources.loaded.values():
        if directions.digest() != record.directions:
            raise ContrastError(
                f"The directions in {settings.contrast.directions} are not those that the model was made with: give their place "
                "with --directions."
            )
    for name, pool in sources.named_pools().items():
        if prompts_digest(pool) != record.prompts.get(name):
            raise ContrastError(
                f"The {name} prompts are not those that the model was made with: give the place of these with "
                f"--{OPTIONS[name]}.dataset, or the directions with --directions."
            )
    now = versions(COMPUTING)
    others = [
        f"{name} {record.versions.get(name)} (now {now.get(name)})"
        for name in dict.fromkeys([*record.versions, *now])
        if record.versions.get(name) != now.get(name)
    ]
    if others:
        warn(
            f"The record was made with {', '.join(others)}, so that the weights may have other last digits."
        )
    return settings, sources


OPTIONS = {"harmful": "bad-prompts", "harmless": "good-prompts", "matched": "matched-prompts"}
"""The options that name the pools of directions."""


def rebuild(
    record: Record,
    settings: RecordedSettings,
    sources: DirectionSources,
    output: Path,
    modifier_class: type["ContrastAbliteration"],
) -> None:
    """Makes a model again, and compares its files. Raises `ContrastError` when the original is not that of the record."""

    if HAS_PLUGIN_SURFACE:
        model_class: type[ChatModel] = ChatModel
    else:
        from .host_model import HostModel as model_class
    model = open_model(settings, model_class)
    context = LoadedContext(model)
    modifier = modifier_class(heretic_settings=settings, settings=settings.contrast)
    # Those that were compared, whatever the files hold by now.
    modifier.known_pools = sources.pools.get("")
    modifier.known_directions = sources.loaded.get("")
    original = modifier.model(context, settings.contrast.batch_size).identified()
    different = differences(record.identity, original.identity(), OF_THE_MODEL)
    if different:
        raise ContrastError(
            f"{model_name(settings.model)} is not the model that the record was made from, or not as it was then: other "
            f"{different}; give the place of that one with --model."
        )
    modifier.init(context)
    made = Made(
        settings,
        settings.contrast,
        original,
        modifier.directions,
        # It may have been made with other versions, which the record knows.
        replace(record.parameters, configuration=""),
        sources.named_pools(),
        record.measured,
    )
    log("* Abliterating...")
    modifier.modify_model(context, made.parameters)
    try:
        with replaced_as_a_whole(output) as unfinished:
            save(model, settings, unfinished)
            found = replace(made, parameters=record.parameters).record(unfinished)
            found.write(unfinished)
    except (OSError, SafetensorError) as error:
        raise ContrastError(
            f"The model could not be saved to {output} ({one_line(str(error))}): make room, or give another --output."
        ) from error
    log(f"Model saved to [bold]{escape(str(output))}[/].")
    if not record.files:
        log("* The record does not say which bytes its weights had.")
    elif found.files == record.files:
        log("* Its weights are those of the record, byte for byte.")
    else:
        parts = ["device", "tokens"] if found.prompts else ["device"]
        different = differences(record.identity, found.identity, parts)
        if found.directions != record.directions:
            different = (
                different or "processor or number of threads, by the last digits of its directions"
            )
        why = (
            f"it was made with another {different}" if different else "its directions are the same"
        )
        warn(f"The weights are not those of the record, byte for byte: {why}.")


def save(model: Any, settings: Any, folder: Path) -> None:
    log("* Saving...")
    if settings.export_strategy == "adapter":
        model.model.save_pretrained(folder, max_shard_size=settings.max_shard_size)
        return
    model.get_merged_model().save_pretrained(folder, max_shard_size=settings.max_shard_size)
    model.tokenizer.save_pretrained(folder)
    if getattr(model, "processor", None) is not None:
        model.processor.save_pretrained(folder)
