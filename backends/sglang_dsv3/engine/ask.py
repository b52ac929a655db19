"""What an installed SGLang knows, printed as JSON. It runs in the engine's environment, by `known`, and imports nothing of ours.

The architectures are what its model files declare (`EntryClass`, which its registry reads as well). They are read and not imported: a
model whose kernels are not on this machine would be missing from a registry that was asked.
"""

import argparse
import ast
import json
from importlib.metadata import version
from pathlib import Path


def architectures(package: Path) -> list[str]:
    """The names of every `EntryClass` below `srt/models`."""
    found: set[str] = set()
    for file in sorted((package / "srt" / "models").rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
            if isinstance(target, ast.Name) and target.id == "EntryClass":
                found |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} - {"EntryClass", "List", "list", "Type"}
    return sorted(found)


def capabilities(package: Path) -> dict[str, int]:
    """The smallest CUDA compute capability (90 for 9.0) of each quantisation, where its class says one number whatever the
    machine; what depends on the machine (FP8) is SGLang's to judge there."""
    found: dict[str, int] = {}
    for file in sorted((package / "srt" / "layers" / "quantization").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                numbers, names = _returned(node, "get_min_capability"), _returned(node, "get_name")
                if len(numbers) == len(names) == 1 and isinstance(numbers[0], int) and isinstance(names[0], str):
                    found[names[0]] = numbers[0]
    return found


def _returned(owner: ast.ClassDef, method: str) -> list[object]:
    """What the returns of a method of a class say, None where that is no constant."""
    bodies = [part for part in owner.body if isinstance(part, ast.FunctionDef) and part.name == method]
    returns = [each.value for body in bodies for each in ast.walk(body) if isinstance(each, ast.Return)]
    return [each.value if isinstance(each, ast.Constant) else None for each in returns]


def taken(action: argparse.Action) -> list[object]:
    """The fewest and the most values that a flag takes (None: any number), and what each must be read as."""
    least, most = {"?": (0, 1), "*": (0, None), "+": (1, None), None: (1, 1)}.get(action.nargs, (action.nargs, action.nargs))
    return [least, most, action.type.__name__ if action.type in (int, float) else ""]


def main() -> None:
    import sglang
    from sglang.srt.environ import Envs
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    package = Path(sglang.__file__).parent
    flags = {flag: [str(each) for each in action.choices or ()] for action in parser._actions for flag in action.option_strings}
    # Plugins may add more of these, so the parser takes any word; a wrong one would end the engine after its weights were loaded.
    flags["--speculative-algorithm"] = [name for name in SpeculativeAlgorithm.__members__ if name != "NONE"] + ["NEXTN"]
    print(json.dumps({
        "version": version("sglang"),
        "architectures": architectures(package),
        "flags": flags,
        "takes": {flag: taken(action) for action in parser._actions for flag in action.option_strings},
        "environment": sorted(name for name in vars(Envs) if name.isupper() or name.startswith("SGLANG_")),
        "capabilities": capabilities(package),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
