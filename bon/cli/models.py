"""``bon models`` and ``bon fetch``: small models, and how to get one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bon.cli.options import JSON

NOTES = """\
A model is used by its name: --policy NAME, --scorer default:NAME. One from
PyPI is fetched with bon fetch NAME, one from the hub on first use; one of
bon's is a small adapter of smollm2-135m, which is fetched in the same way.
On a CPU 135M parameters take 0.5 GB of memory, and two cores read or write
100 to 300 tokens/s; others cost in proportion to their parameters."""


def models(as_json: JSON = False) -> int:
    """List small models that are known to work: size, licence, where they come from, whether they are here."""
    from bon.catalog import CATALOG
    from bon.cli.terminal import print_json, quiet_libraries

    quiet_libraries()
    known: list[dict[str, Any]] = [
        {
            "name": name,
            "parameters": entry.parameters,
            "bytes": entry.size,
            "licence": entry.licence,
            "from": "PyPI" if entry.wheel else "bon" if entry.base else "hub",
            "here": _is_here(name),
        }
        for name, entry in CATALOG.items()
    ]
    if as_json:
        print_json(known)
        return 0
    print(f"{'name':<35}  params  download  licence     from  here")
    for each in known:
        sizes = f"{each['parameters'] / 1e6:>5.0f}M  {each['bytes'] / 1e9:>5.2f} GB"
        print(
            f"{each['name']:<35}  {sizes}  {each['licence']:<10}  {each['from']:<4}  {'yes' if each['here'] else 'no'}"
        )
    print(f"\n{NOTES}")
    return 0


def _is_here(name: str) -> bool:
    from bon.catalog import CATALOG, kept_in
    from bon.engines.loading import cached

    name = CATALOG[name].base or name
    return kept_in(name).is_dir() if CATALOG[name].wheel else cached(name) is not None


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model that bon models lists, or one of the hub.")],
) -> int:
    """Bring a model onto this machine; what is here already is not fetched again."""
    from bon.cli.terminal import quiet_libraries
    from bon.fetching import fetch as get

    quiet_libraries()
    print(get(name))
    return 0
