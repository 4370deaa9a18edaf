"""The `narrows` command. Each command loads what it needs when it runs: `--help` imports neither numpy nor torch."""

import json
import sys

import click

from narrows.cli import evidence, failures, hardware, models, planning, running
from narrows.errors import NarrowsError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="narrows")
def cli() -> None:
    """Find what limits a deep network on a machine, rank the published techniques that widen it, apply them, verify the gain.

    \b
    narrows diagnose llama-3.1-70b --machine h100-sxm --devices 4 --decode --batch 16 --context 4096
    narrows prescribe smollm2-135m --machine here --decode
    narrows apply smollm2-135m --plan "bf16 + awq:group=64" --out smaller
    narrows verify smollm2-135m smaller --machine here
    """


def main() -> None:
    """Run the command line; a NarrowsError becomes one line on stderr and exit code 2."""
    try:
        cli(standalone_mode=False)
    except NarrowsError as error:
        _refuse(str(error))
    except click.ClickException as error:
        where = f" See `{error.ctx.command_path} --help`." if isinstance(error, click.UsageError) and error.ctx else ""
        _refuse(error.format_message() + where)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; nothing was written.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


def _refuse(message: str) -> None:
    click.echo(json.dumps({"error": message}) if "--json" in sys.argv else f"error: {message}", err=True)
    sys.exit(2)


for _command in (
    models.capture,
    models.diagnose,
    models.prescribe,
    models.measure,
    models.apply,
    models.verify,
    failures.simulate,
    planning.plan,
    running.run,
    evidence.papers,
    evidence.reproduce,
    hardware.machines,
    models.models,
    hardware.calibrate,
    evidence.validate,
    hardware.doctor,
):
    cli.add_command(_command)
