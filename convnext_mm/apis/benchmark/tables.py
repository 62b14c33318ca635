"""The paper's tables: what was measured beside what was published."""

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.table import Table

from .paper import FAILED, OUT_OF_MEMORY, STOCK
from .published import CONDITIONS, Figures

UNITS = dict(images_per_s='images/s', peak_bytes='GiB')
SCALES = dict(images_per_s=1, peak_bytes=2**30)
LABELS = dict(resnet50='ResNet-50', swin='Swin', auto='auto (ours)')
RATIOS = (
    "'over stock': over the paper's ConvNeXt (or mmpretrain's, where that was not "
    "measured) in the same rounds; of published figures 'over ConvNeXt'. "
)


def tables(result: dict) -> Iterator[Table]:
    """A table for each block and quantity of a result.

    Args:
        result: What :func:`convnext_mm.apis.benchmark.paper.run_paper` gave.
    """
    groups: dict[tuple[str, str], dict[tuple[str, int, str], list[dict]]] = {}
    for row in result['rows']:
        group = groups.setdefault((row['block'], row['quantity']), {})
        group.setdefault((row['row'], row['batch'], row['dtype']), []).append(row)
    for (block, quantity), cases in groups.items():
        fp32 = any(dtype == 'fp32' for *_, dtype in cases)
        table = Table(
            title=f'{block}, {UNITS[quantity]}',
            caption=RATIOS + f'fp32 is {result["fp32"]}. ' * fp32 + CONDITIONS[block],
            box=SIMPLE,
            title_justify='left',
            caption_justify='left',
        )
        table.add_column('', no_wrap=True)
        for head in ('network', UNITS[quantity], 'over stock'):
            table.add_column(head)
        for head in ('published', 'over ConvNeXt'):
            table.add_column(head)
        for (title, batch, dtype), rows in cases.items():
            labels = iter([title, f'batch {batch}, {dtype}'])
            stock = _stock(rows)
            for row in rows:
                table.add_row(
                    next(labels, ''),
                    LABELS.get(row['network'], row['network']),
                    *_measured(row, stock),
                    *_published(row),
                )
            for label in labels:  # fewer networks than lines
                table.add_row(label)
            table.add_section()
        yield table


def _stock(rows: list[dict]) -> float | None:
    values = {row['network']: _value(row) for row in rows}
    return next((values[name] for name in STOCK if values.get(name)), None)


def _value(row: dict) -> float | None:
    quantity = row['quantity']
    return row[quantity] / SCALES[quantity] if quantity in row else None


def _measured(row: dict, stock: float | None) -> tuple[str, str]:
    value = _value(row)
    if value is None:
        return row['status'], ''
    return (
        f'{value:.1f}' if value >= 10 else f'{value:.3g}',
        f'{value / stock:.2f}' if stock else '',
    )


def _published(row: dict) -> tuple[str, str]:
    speed = row['quantity'] == 'images_per_s'
    if row['published'] is None or (speed and row['dtype'] != 'fp32'):
        return '', ''
    figures = Figures(**row['published'])
    others = dict(swin=figures.swin, resnet50=figures.resnet50)
    if row['network'] not in others:
        again = f', 22K {figures.convnext_22k}' if figures.convnext_22k else ''
        return f'{figures.convnext}{again}', '1.00'
    value = others[row['network']]
    return (f'{value}', f'{value / figures.convnext:.2f}') if value else ('', '')


def problems(result: dict) -> list[str]:
    """One sentence for each reason why cells have no figure."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in result['rows']:
        if 'status' in row:
            key = (row['network'], row['status'], row['reason'])
            reasons.setdefault(key, []).append(f'{row["row"]} {row["dtype"]}')
    return [
        f'{network}: {status} ({"; ".join(dict.fromkeys(rows))}): {reason}'
        for (network, status, reason), rows in reasons.items()
    ]


def unmeasured(result: dict) -> list[str]:
    """What should have been measured, and was not."""
    return [
        f'{row["row"]} {row["dtype"]} {row["network"]} ({row["status"]})'
        for row in result['rows']
        if row.get('status') in (OUT_OF_MEMORY, FAILED)
    ]
