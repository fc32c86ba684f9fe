"""One page about one or several runs, to open in a browser: interactive, and complete in itself (needs plotly)."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from alpha_optim.report.plots import (
    COLOURS,
    EARLY_TO_LATE,
    SHADES,
    VISIBLE,
    by_reason,
    lowest_shown,
    spans_of,
    window_of,
)
from alpha_optim.report.recording import Recording
from alpha_optim.report.sampling import extremes, trailing_mean
from alpha_optim.report.story import told
from alpha_optim.report.summary import SUMMARY, summary

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ --ink: #1b1f24; --paper: #ffffff; --soft: #57606a; --box: #f3f5f7; color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6edf3; --paper: #14181d; --soft: #9aa5b1; --box: #1f252c; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }} h3 {{ font-size: 1rem; }}
p.note {{ color: var(--soft); font-size: .92rem; }}
.verdict {{ background: var(--box); border-left: 4px solid #0072b2; padding: .7rem 1rem; border-radius: 4px; }}
ul.story {{ padding-left: 1.2rem; max-height: 34rem; overflow: auto; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .8rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} tr + tr td {{ border-top: 1px solid var(--box); }}
.js-plotly-plot text {{ fill: var(--ink) !important; }}
.js-plotly-plot .hoverlayer text {{ fill: #ffffff !important; }}
</style>
<script>{library}</script></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
_CONFIG = {"displaylogo": False, "responsive": True, "scrollZoom": True}
_GRID = "rgba(128,128,128,0.25)"
_SINGLE = "rgba(128,128,128,0.55)"
_SYMBOLS = ("x", "cross", "triangle-down", "triangle-up", "square", "diamond", "circle")


def page(recordings: Sequence[Recording]) -> str:
    """Build the page.

    Args:
        recordings: The runs, at least one; several are compared first.

    Returns:
        HTML with everything in it: no network is needed to look at it.

    Raises:
        ImportError: If plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("a report needs plotly: pip install 'alpha-optim[report]'") from error
    title = ", ".join(recording.name for recording in recordings[:3])
    title += f" and {len(recordings) - 3} more" if len(recordings) > 3 else ""
    parts = [_compared(recordings)] if len(recordings) > 1 else []
    parts += [_run(recording, heading=len(recordings) > 1) for recording in recordings]
    return _PAGE.format(title=html.escape(title), library=get_plotlyjs(), body="\n".join(parts))


def _run(recording: Recording, heading: bool) -> str:
    """What is said of one run: diagnosis, story, pictures."""
    iterations = recording.iterations
    story = "\n".join(f"<li>{html.escape(line)}</li>" for line in told(recording))
    where = f"{len(recording):,} measurements of the iterations {iterations[0]:,} to {iterations[-1]:,}"
    unfinished = " The last line of the file is incomplete and was left out." if recording.unfinished else ""
    return "\n".join(
        [
            f"<h2>{html.escape(recording.name)}</h2>" if heading else "",
            f'<p class="verdict">{html.escape(str(recording.diagnosis()))}</p>',
            f'<p class="note">{where}.{unfinished}</p>',
            f'<h3>What happened</h3><ul class="story">{story}</ul>',
            "<h3>Over the run</h3>",
            _div(_over_the_run(recording)),
            "<h3>Where the steps end</h3>",
            '<p class="note">α compares a step with the distance to the minimum of a parabola fitted along it: −1 is '
            "no step at all, 0 ends in the minimum, +1 at the same height on the other side.</p>",
            _div(_where_steps_end(recording)),
            "<h3>α against the learning rate</h3>",
            _div(_against_rate(recording)),
        ]
    )


def _compared(recordings: Sequence[Recording]) -> str:
    rows = "\n".join(
        f"<tr><td>{html.escape(recording.name)}</td>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in summary(recording))
        + "</tr>"
        for recording in recordings
    )
    heads = "".join(f"<th>{head}</th>" for head in ("run", *SUMMARY))
    return f"<h2>Compared</h2><table><tr>{heads}</tr>{rows}</table>{_div(_beside_each_other(recordings))}"


# -------------------------------------------------------------------- pictures


def _figure(rows: int, height: int) -> Any:
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.05)
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 80, "r": 20, "t": 40, "b": 110},
        hovermode="closest",
        legend={"orientation": "h", "y": -70.0 / (height - 150), "yanchor": "top"},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False)
    return figure


def _div(figure: Any) -> str:
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)
    return text


def _over_the_run(recording: Recording) -> Any:
    """Loss, alpha and learning rate over the iterations."""
    figure = _figure(3, 760)
    x, losses, rates = recording.iterations, recording.losses, recording.rates
    at = extremes(losses)
    hover = "iteration %{x}<br>loss %{y:.5g}<br>learning rate %{customdata:.4g}<extra></extra>"
    figure.add_scattergl(
        x=x[at], y=losses[at], name="mini-batch loss", line={"color": COLOURS[0], "width": 1.2},
        customdata=rates[at], hovertemplate=hover, row=1, col=1,
    )  # fmt: skip
    _add_alpha(figure, recording)
    at = extremes(np.log(np.where(rates > 0, rates, np.nan)))
    figure.add_scattergl(
        x=x[at], y=np.where(rates[at] > 0, rates[at], np.nan), name="learning rate",
        line={"color": COLOURS[2], "width": 1.6},
        hovertemplate="iteration %{x}<br>learning rate %{y:.4g}<extra></extra>", row=3, col=1,
    )  # fmt: skip
    _add_events(figure, recording)
    _add_phases(figure, recording)
    figure.update_yaxes(title="loss", row=1, col=1)
    figure.update_yaxes(title="step length α", range=list(VISIBLE), row=2, col=1)
    figure.update_yaxes(title="learning rate", type="log", exponentformat="power", range=_decades(rates), row=3, col=1)
    figure.update_xaxes(title="iteration", row=3, col=1)
    return figure


def _decades(rates: Any) -> list[float] | None:
    """What of a logarithmic axis of learning rates is shown first: not the far too low ones a search begins with."""
    lowest = lowest_shown(rates)
    if lowest is None:
        return None
    return [float(np.log10(lowest)) - 0.3, float(np.log10(np.nanmax(rates))) + 0.3]


def _add_alpha(figure: Any, recording: Recording) -> None:
    """Single alphas as dots, the windowed one with its standard error as a band."""
    x, alphas, stds, rates = recording.iterations, recording.alphas, recording.stds, recording.rates
    at = extremes(alphas)
    statuses = recording.statuses
    details = [[stds[k], rates[k], statuses[k]] for k in at]
    figure.add_scattergl(
        x=x[at], y=np.clip(alphas[at], *VISIBLE), mode="markers", name="α of one step",
        marker={"color": _SINGLE, "size": 4}, customdata=details, text=[f"{alphas[k]:+.3f}" for k in at],
        hovertemplate="iteration %{x}<br>α %{text} ± %{customdata[0]:.3f}<br>learning rate %{customdata[1]:.4g}"
        "<br>%{customdata[2]}<extra></extra>",
        row=2, col=1,
    )  # fmt: skip
    size = window_of(len(recording))
    middle, error = recording.windowed(size)
    at = extremes(middle)
    above, below = middle[at] + error[at], middle[at] - error[at]
    band = {"line": {"width": 0}, "hoverinfo": "skip", "mode": "lines", "showlegend": False}
    figure.add_scatter(x=x[at], y=np.clip(above, *VISIBLE), **band, row=2, col=1)
    figure.add_scatter(
        x=x[at], y=np.clip(below, *VISIBLE), fill="tonexty", fillcolor="rgba(0,114,178,0.2)", **band, row=2, col=1
    )
    figure.add_scatter(
        x=x[at], y=middle[at], name=f"α over {size} steps, ± its standard error",
        line={"color": COLOURS[0], "width": 2}, customdata=np.stack([error[at], rates[at]], axis=-1),
        hovertemplate="iteration %{x}<br>α %{y:+.3f} ± %{customdata[0]:.3f}<br>learning rate %{customdata[1]:.4g}"
        "<extra></extra>",
        row=2, col=1,
    )  # fmt: skip
    figure.add_hline(y=0.0, line={"color": _SINGLE, "width": 1}, row=2, col=1)


def _add_events(figure: Any, recording: Recording) -> None:
    """What the guard did, at the learning rate's curve, a mark for each reason."""
    x, rates = recording.iterations, recording.rates
    for (label, group), symbol in zip(by_reason(recording.events[-2000:]).items(), _SYMBOLS, strict=False):
        where = [event.iteration for event in group]
        places = np.searchsorted(x, where).clip(0, len(x) - 1)
        figure.add_scatter(
            x=where, y=rates[places], mode="markers", name=label,
            marker={"color": COLOURS[1], "symbol": symbol, "size": 9}, text=[str(event) for event in group],
            hovertemplate="%{text}<extra></extra>", row=3, col=1,
        )  # fmt: skip


def _add_phases(figure: Any, recording: Recording) -> None:
    """Phases of a search, shaded, with their names."""
    for span in spans_of(recording.phases, int(recording.iterations[-1])):
        shade = SHADES.get(span.name, 0.0)
        figure.add_vrect(x0=span.begin, x1=span.end, fillcolor=_SINGLE, opacity=shade, line_width=0, row="all", col=1)
        figure.add_vline(x=span.begin, line={"color": _SINGLE, "width": 1, "dash": "dot"}, row="all", col=1)
        figure.add_annotation(
            x=span.begin, y=1.0, xref="x", yref="y domain", text=span.name, showarrow=False, xanchor="left",
            yanchor="bottom", textangle=-90 if span.narrow else 0, font={"size": 11},
        )  # fmt: skip


def _where_steps_end(recording: Recording) -> Any:
    """How often steps end where on the unit parabola: over the run, and over its latest tenth."""
    figure = _figure(1, 380)
    bins = np.linspace(*VISIBLE, 59)
    middle = (bins[1:] + bins[:-1]) / 2
    tenth = max(1, len(recording) // 10)
    for name, alphas, colour in (
        ("all steps", recording.alphas, "rgba(128,128,128,0.45)"),
        ("latest tenth", recording.alphas[-tenth:], "rgba(0,114,178,0.55)"),
    ):
        counts = np.histogram(np.clip(alphas[np.isfinite(alphas)], bins[0], bins[-1]), bins)[0]
        share = 100.0 * counts / max(1, counts.sum())
        figure.add_bar(
            x=middle, y=share, name=name, marker={"color": colour, "line": {"width": 0}},
            hovertemplate="α around %{x:+.2f}: %{y:.1f} % of " + name + "<extra></extra>",
        )  # fmt: skip
    line = np.linspace(*VISIBLE, 200)
    highest = max(1.0, max(float(np.max(bar.y)) for bar in figure.data))
    figure.add_scatter(
        x=line, y=line**2 * highest / 2, name="the loss along a step", line={"color": COLOURS[1], "width": 2},
        hoverinfo="skip",
    )  # fmt: skip
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_xaxes(title="step length α (−1: start, 0: minimum, +1: as high as the start)")
    figure.update_yaxes(title="share of the steps, %")
    return figure


def _against_rate(recording: Recording) -> Any:
    """Windowed alpha against the learning rate, coloured by the place in the run."""
    figure = _figure(1, 380)
    rates, (middle, _) = recording.rates, recording.windowed(window_of(len(recording)))
    at = extremes(middle, 2000)
    at = at[rates[at] > 0]
    figure.add_scattergl(
        x=rates[at], y=np.clip(middle[at], *VISIBLE), mode="markers", name="", showlegend=False,
        marker={"color": recording.iterations[at], "colorscale": list(EARLY_TO_LATE), "size": 5,
                "colorbar": {"title": "iteration"}},
        customdata=recording.iterations[at],
        hovertemplate="iteration %{customdata}<br>learning rate %{x:.4g}<br>α %{y:+.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_hline(y=0.0, line={"color": _SINGLE, "width": 1})
    figure.update_xaxes(title="learning rate", type="log", exponentformat="power", range=_decades(rates))
    figure.update_yaxes(title="step length α", range=list(VISIBLE))
    return figure


def _beside_each_other(recordings: Sequence[Recording]) -> Any:
    """Loss and learning rate of several runs."""
    figure = _figure(2, 560)
    for place, recording in enumerate(recordings):
        colour = COLOURS[place % len(COLOURS)]
        losses = trailing_mean(recording.losses, window_of(len(recording)))
        curves = (losses, "loss %{y:.5g}"), (recording.rates, "learning rate %{y:.4g}")
        for row, (values, hover) in enumerate(curves, start=1):
            at = extremes(values, 2000)
            figure.add_scattergl(
                x=recording.iterations[at], y=values[at], name=recording.name, legendgroup=recording.name,
                showlegend=row == 1, line={"color": colour, "width": 1.6},
                hovertemplate=f"{html.escape(recording.name)}<br>iteration %{{x}}<br>{hover}<extra></extra>",
                row=row, col=1,
            )  # fmt: skip
    ranges = [found for recording in recordings if (found := _decades(recording.rates)) is not None]
    shown = [min(low for low, _ in ranges), max(high for _, high in ranges)] if ranges else None
    figure.update_yaxes(title="loss, averaged", row=1, col=1)
    figure.update_yaxes(title="learning rate", type="log", exponentformat="power", range=shown, row=2, col=1)
    figure.update_xaxes(title="iteration", row=2, col=1)
    return figure
