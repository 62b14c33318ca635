"""The README's table beside other libraries says what trying them gives."""

import json

import pytest

import compare_libraries
from compare_libraries import LIBRARIES, MEASURED, RESULT, ROWS
from repo import ROOT

WRITTEN = json.loads(RESULT.read_text())


def test_table_is_that_of_the_results():
    readme = (ROOT / 'README.md').read_text()
    assert compare_libraries.fill(readme, WRITTEN) == readme
    assert list(WRITTEN['rows']) == list(ROWS)
    listed = readme.partition('compare_libraries.py ROW')[2].partition('<!--')[0]
    assert all(name in listed.split('`')[2].split() for name in ROWS), listed


@pytest.mark.slow
@pytest.mark.parametrize('row', ROWS)
@pytest.mark.parametrize('library', LIBRARIES)
def test_cell(library, row):
    if library != 'convnext_mm':
        pytest.importorskip(library)
    if row not in MEASURED and WRITTEN['versions'] != compare_libraries.versions():
        pytest.skip('the table is of other versions')
    cell = ROWS[row][1](library)
    if cell is None:
        pytest.skip('no sample checkpoints; CONVNEXT_MM_SHARED can name their folder')
    assert cell == WRITTEN['rows'][row][library]


@pytest.mark.parametrize(
    'arguments, reason',
    [
        (['speed'], 'no row speed: one of maps'),
        (['maps', '--write'], '--write keeps all rows'),
    ],
)
def test_mistakes(arguments, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        compare_libraries.main(arguments)
    assert stop.value.code == 2 and reason in capsys.readouterr().err
