# SPDX-License-Identifier: MIT
"""Does a model keep to the people and things of its own story?

    python tests/studies/story_consistency.py --model out/ch02_gpt2

The model continues the first words of held-out stories. Because the stories' world is
known, `data/make_stories.py` can measure what a loss cannot say: the share of written
stories that keep to at most three characters and two things, as every real story does,
and the share without any fault that it can see, such as a person who is named later
without having appeared.
It works for every chapter's model that was trained on the stories: the chapter is
found by which of them can read the model's folder.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chapters import ROOT, discover, load  # noqa: E402


def load_stories() -> ModuleType:
    """`data/make_stories.py` as a module."""
    path = ROOT / "data" / "make_stories.py"
    spec = importlib.util.spec_from_file_location("make_stories", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_stories(
    module: ModuleType,
    folder: Path,
    n: int,
    n_prompt: int = 8,
    temperature: float = 0.7,
    batch_size: int = 50,
) -> list[str]:
    """`n` stories by the model in `folder`, each from `n_prompt` tokens of a real one.

    The openings are those of the first `n` held-out stories.
    """
    import torch

    model = module.Transformer.from_pretrained(folder)
    tokenizer = module.load_tokenizer(folder)
    held_out = module.split_documents(module.read_text(module.DEFAULT_DATA))[1]
    if n > len(held_out):
        raise ValueError(f"{n} stories asked for, {len(held_out)} openings there")
    prompts = torch.tensor(
        [tokenizer.encode(story)[:n_prompt] for story in held_out[:n]]
    )
    generator = torch.Generator().manual_seed(0)
    written = []
    for batch in prompts.split(batch_size):
        tokens = module.generate(
            model,
            batch,
            model.config.max_seq_len - n_prompt,
            temperature=temperature,
            stop=[tokenizer.eos_id],
            generator=generator,
        )
        texts = (tokenizer.decode(row) for row in tokens.tolist())
        written += [text.split(module.END_OF_TEXT)[0] for text in texts]
    return written


def measure(module: ModuleType, folder: Path, n: int) -> dict:
    """Consistency and share of distinct sentences, of written and of real stories."""
    stories = load_stories()
    mark = f"\n{module.END_OF_TEXT}\n"
    written = write_stories(module, folder, n)
    real = module.split_documents(module.read_text(module.DEFAULT_DATA))[1][:n]

    def without_faults(texts: list[str]) -> float:
        return sum(not stories.faults(text) for text in texts) / len(texts)

    return {
        "stories": n,
        "consistency": stories.consistency(mark.join(written)),
        "without_faults": without_faults(written),
        "distinct_sentences": stories.distinct_sentences(mark.join(written)),
        "real_consistency": stories.consistency(mark.join(real)),
        "real_without_faults": without_faults(real),
        "real_distinct_sentences": stories.distinct_sentences(mark.join(real)),
        "example": written[0],
    }


def reader(folder: Path) -> ModuleType:
    """The first chapter that reads the model in `folder` and was made for stories."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no model in {folder}: it holds no config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    for chapter in discover():
        module = load(chapter)
        if module.DEFAULT_DATA.name == "stories.txt":
            try:
                module.Config.from_hf(config)
            except ValueError:
                continue
            return module
    raise ValueError(f"no chapter reads the model in {folder}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR", type=Path)
    parser.add_argument("--stories", default=200, type=int, metavar="N")
    args = parser.parse_args()
    try:
        found = measure(reader(args.model), args.model, args.stories)
    except (OSError, ValueError) as error:
        print(f"story_consistency.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
