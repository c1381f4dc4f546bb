"""The model card: what was made, from what, how well it does, and what it is not good for."""

from __future__ import annotations

from fedllm.methods.registry import method_class
from fedllm.models.made import NAMES as BUILT
from fedllm.report.facts import duration, figures, label, read_facts
from fedllm.report.statement import summary
from fedllm.runs.folder import RunFolder
from fedllm.runs.progress import size
from fedllm.runs.result import Result


def model_card(folder: RunFolder, result: Result) -> str:
    """Markdown with the front matter that model hubs read."""
    facts = read_facts(folder)
    r = facts.recipe
    card = method_class(result.method).card
    base = r["model"]["name"]
    served, tests = result.adapter_path, result.bytes.get("evaluation")
    rows = sum(c["n"] for c in facts.clients)
    lines = ["---", f"base_model: {base}", "tags: [federated-learning, fedllm]",
             *(["library_name: peft"] if served and served.name == "adapter" else []), "---", "",
             f"# {r['name']}", "",
             f"{base!r} trained with **{card.title}** over {len(facts.clients)} clients ({rows} training rows in all, "
             f"never pooled), {result.rounds} rounds, seed {result.seed}.", "",
             "## How to use it", "", *_usage(result, base), "", "## Results", "", *_results(result), "",
             "## How it was made", "",
             f"* method: `{result.method}`, {card.paper}", f"* trained: `{r['space']}`", f"* local: `{r['local']}`",
             f"* data: source `{r['data']['source']}`, task {r['data']['task']}",
             f"* traffic: {size(result.bytes['up'])} up, {size(result.bytes['down'])} down, framing included"
             + (f"; to test: {size(tests['up'])} up, {size(tests['down'])} down" if tests else ", tests too"),
             f"* time: {duration(result.seconds)}, peak memory {size(result.peak_memory_bytes)}",
             f"* final state: `{result.state_digest}`",
             f"* versions: {', '.join(f'{k} {v}' for k, v in r['versions'].items())}", "", "## Privacy", "",
             *summary(result, facts), "", "`privacy_statement.md` says who saw what, and what is not covered.", "",
             "## Limits", "", *_limits(facts, result, r)]
    return "\n".join(lines) + "\n"


def _usage(result: Result, base: str) -> list[str]:
    served = result.adapter_path
    if served is None:
        if (result.folder / "modules").is_dir():
            return ["One backbone serves a module for each task; they lie in `modules/`."]
        return ["The run serves no single model; what each client has lies in `clients/`."]
    if served.name == "trainables":
        return ["What was trained is no PEFT adapter and no change of the base's weights, so it works in fedllm alone: "
                "start a recipe of the same space from it (`space.start_from: trainables`)."]
    if base == "policy":
        return ["`model/policy.safetensors` holds the policy's linear maps, to be put between tanh in their order."]
    if base in BUILT:
        return [f"`model/{base}.safetensors` holds the network's weights; the recipe beside it says how it is built "
                "(`model`, `data`)."]
    if served.name == "model":
        return ["```python", "from transformers import AutoModelForCausalLM",
                'model = AutoModelForCausalLM.from_pretrained("model")', "```"]
    return ["```python", "from peft import AutoPeftModelForCausalLM",
            'model = AutoPeftModelForCausalLM.from_pretrained("adapter")', "```", "",
            f"`fedllm export {result.folder} --merge` writes a merged checkpoint; `fedllm chat {result.folder}` "
            "talks to it."]


def _results(result: Result) -> list[str]:
    columns, rows = figures(result)
    if not columns:
        return ["No test was given."]
    head = [f"{'own tests' if own else 'global'}: {label(n, result.metrics)}" for own, n in columns]
    table = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name, cells in rows:
        table.append(f"| {name} | " + " | ".join(cells) + " |")
    return table


def _limits(facts: object, result: Result, recipe: dict) -> list[str]:
    said = ["* Raw rows stayed with the clients, but updates can leak what they were trained on: this run "
            + ("had these layers: " + ", ".join(x["name"] for x in recipe["layers"]) + "." if recipe["layers"]
               else "had no privacy layer.")]
    if result.skipped:
        said.append(f"* Rounds without enough answers: {', '.join(str(k + 1) for k in result.skipped)}.")
    if result.failed:
        said.insert(0, f"* The run failed: {result.failed}. What it left is where it began.")
    if result.best and result.best["kept"]:
        said.append(f"* This is the model after round {result.best['round']} of {result.rounds}, whose loss on "
                    f"{result.best['of']} was the best ({result.best['loss']:.4g}).")
    if result.ended:
        said.append(f"* The run ended before round {result.rounds + 1} of {recipe['rounds']}: {result.ended}.")
    return said
