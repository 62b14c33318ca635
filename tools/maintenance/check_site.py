"""Looks at the built site as its readers do, in Chromium: links, pictures, search,
phone width, both colour schemes, sorting. Ends with status 1 where something is wrong.

    python tools/maintenance/check_site.py site
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from urllib.parse import quote, unquote, urldefrag, urlsplit

from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    sync_playwright,
)
from playwright.sync_api import TimeoutError as PlaywrightTimeout

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
OPTIONS = (
    '--no-sandbox',  # which needs privileges that containers do not give
    '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
)
DESKTOP, PHONE = dict(width=1280, height=900), dict(width=390, height=844)
SCHEMES = dict(light='default', dark='slate')
CONTRAST = 4.5  # WCAG 2.2, level AA
# What is typed, and the page that must be among the results.
QUERIES = {
    'LayerDecayOptimWrapperConstructor': 'reference/',
    'drop_path_rate': 'reference/',
    'the pickle asks for': 'troubleshooting/',
    'CUDA out of memory': 'troubleshooting/',
    'cascade-mask-rcnn_convnext-b': 'model_zoo/',
}
SHOWN = ('', 'reference/', 'model_zoo/', 'architecture/', 'troubleshooting/')
FACTS = """() => ({
    ids: [...document.querySelectorAll('[id], a[name]')].map((e) => e.id || e.name),
    links: [...document.querySelectorAll('a[href]')].map((e) => e.href),
    pictures: [...document.images].map((e) => [e.src, e.naturalWidth]),
})"""
# The first element beyond the right edge that nothing scrolls or cuts.
OVERFLOW = """() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return null;
    const wide = [...document.querySelectorAll('.md-container *')].filter(
        (e) => e.getBoundingClientRect().right > width + 1);
    const free = wide.find((e) => {
        for (let p = e; p; p = p.parentElement)
            if (getComputedStyle(p).overflowX !== 'visible') return false;
        return true;
    }) || wide[0] || document.body;
    return free.outerHTML.slice(0, 120);
}"""
# The lowest contrast of text in an article, with the text.
LOWEST = """(scheme) => {
    document.body.setAttribute('data-md-color-scheme', scheme);
    const parse = (text) => {
        const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
        const unit = text.startsWith('color(') ? 1 : 255;
        return [r / unit, g / unit, b / unit, a];
    };
    const over = (top, below) =>
        [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
    const ground = (e) => {
        const own = parse(getComputedStyle(e).backgroundColor);
        if (own[3] === 1) return own;
        return over(own, e.parentElement ? ground(e.parentElement) : [1, 1, 1, 1]);
    };
    const luminance = (c) => {
        const [r, g, b] = c.map((v) =>
            v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let [lowest, where] = [21, ''];
    const text = 'h1, h2, h3, p, li, td, th, a:not(.headerlink), code, code span';
    for (const e of document.querySelectorAll(`article :is(${text})`)) {
        if (!e.textContent.trim() || !e.checkVisibility()) continue;
        const below = ground(e);
        const [x, y] = [over(parse(getComputedStyle(e).color), below), below]
            .map(luminance).sort((a, b) => a - b);
        const contrast = (y + 0.05) / (x + 0.05);
        if (contrast < lowest) [lowest, where] = [contrast, e.outerHTML.slice(0, 120)];
    }
    return [lowest, where];
}"""


class Visit(NamedTuple):
    """What a page has."""

    ids: set[str]
    links: list[str]
    pictures: list[tuple[str, int]]


class Site:
    """The site, as it is served and shown, and what is found wrong with it."""

    def __init__(self, folder: Path, address: str, browser: Browser) -> None:
        self.folder, self.address = folder, address
        self.pages = sorted(
            f'{path.parent.relative_to(folder).as_posix()}/'
            if path.parent != folder
            else ''
            for path in folder.rglob('index.html')
        )
        self.browser = browser
        self.faults: list[str] = []
        self.requests = 0
        self.now = ''  # the page that is looked at

    def fault(self, what: str) -> None:
        self.faults.append(f'/{self.now}: {what}')

    def open(self, scheme: str = 'light') -> Page:
        """A window that notes what goes wrong in it."""
        page = self.browser.new_page(viewport=DESKTOP, color_scheme=scheme)
        page.on('request', self._count)
        page.on('console', self._note)
        page.on('pageerror', lambda error: self.fault(f'script: {error}'))
        page.on('requestfailed', lambda r: self.fault(f'request failed: {r.url}'))
        page.on(
            'response',
            lambda r: r.status < 400 or self.fault(f'status {r.status}: {r.url}'),
        )
        return page

    def _count(self, request: Request) -> None:
        self.requests += 1
        if not request.url.startswith((self.address, 'data:', 'blob:')):
            self.fault(f'asks another host: {request.url}')

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == 'error':
            self.fault(f'console: {message.text}')

    def go(self, page: Page, uri: str) -> None:
        self.now = uri
        page.goto(self.address + uri)
        page.add_style_tag(content='* { transition: none !important }')

    def report(self, what: str, faults_before: int) -> None:
        found = len(self.faults) - faults_before
        print(f'{"FAIL" if found else "ok"}    {what}', flush=True)
        for fault in self.faults[faults_before:][:20]:
            print(f'        {fault}')


def visit_all(site: Site) -> dict[str, Visit]:
    """Every page, in each scheme, on a desktop and on a phone."""
    visits, contrasts = {}, []
    narrow: list[str] = []
    pale: list[str] = []
    page = site.open()
    for uri in site.pages:
        page.set_viewport_size(DESKTOP)
        site.go(page, uri)
        facts = page.evaluate(FACTS)
        visits[uri] = Visit(set(facts['ids']), facts['links'], facts['pictures'])
        for name, scheme in SCHEMES.items():
            contrast, where = page.evaluate(LOWEST, scheme)
            contrasts.append(contrast)
            if contrast < CONTRAST:
                pale.append(f'/{uri}: {name}: contrast {contrast:.2f}: {where}')
        page.set_viewport_size(PHONE)
        wide = page.evaluate(OVERFLOW)
        if wide:
            narrow.append(f'/{uri}: wider than {PHONE["width"]} px: {wide}')
    page.close()
    site.report(
        f'{len(site.pages)} pages, {site.requests} requests: none fails, goes to '
        'another host, or logs an error',
        0,
    )
    for what, faults in (
        (f'{len(site.pages)} pages at {PHONE["width"]} px: none is wider', narrow),
        (f'contrast of text: at least {min(contrasts):.2f} in both schemes', pale),
    ):
        before = len(site.faults)
        site.faults += faults
        site.report(what, before)
    return visits


def check_links(site: Site, visits: dict[str, Visit]) -> None:
    before, links, others = len(site.faults), 0, set()
    for site.now, visit in visits.items():
        for link in visit.links:
            if not link.startswith(site.address):
                others.add(link)
                continue
            links += 1
            url, anchor = urldefrag(link)
            uri = unquote(url.removeprefix(site.address)).removesuffix('index.html')
            if uri not in visits:
                if not (site.folder / uri).is_file():
                    site.fault(f'link to what is not there: {link}')
            elif anchor and unquote(anchor) not in visits[uri].ids:
                site.fault(f'link to a heading that is not there: {link}')
        for link in others:
            if urlsplit(link).scheme not in ('http', 'https', 'mailto'):
                site.fault(f'link that leads nowhere: {link}')
    what = f'{links} links within the site: all lead somewhere'
    site.report(f'{what} ({len(others)} addresses elsewhere are not asked)', before)


def check_pictures(site: Site, visits: dict[str, Visit]) -> None:
    before, count = len(site.faults), 0
    for site.now, visit in visits.items():
        for source, width in visit.pictures:
            count += 1
            if not width:
                site.fault(f'picture does not load: {source}')
    site.report(f'{count} pictures: all load', before)


def check_search(site: Site) -> None:
    before = len(site.faults)
    page = site.open()
    for query, wanted in QUERIES.items():
        site.go(page, f'?q={quote(query)}')
        result = f'.md-search-result__link[href*="/{wanted}"]'
        try:
            page.wait_for_selector(result, state='attached', timeout=10_000)
        except PlaywrightTimeout:
            site.fault(f'search for {query!r} does not find {wanted}')
    page.close()
    site.report(f'{len(QUERIES)} searches: all find their pages', before)


def check_toggle(site: Site) -> None:
    before = len(site.faults)
    page = site.open()
    site.go(page, '')
    seen = []
    for _ in range(3):
        page.click('label[for^="__palette"]:visible')
        seen.append(page.get_attribute('body', 'data-md-color-scheme'))
    if set(seen) != set(SCHEMES.values()):
        site.fault(f'the switch of colour schemes gives {seen}')
    page.close()
    page = site.open('dark')
    site.go(page, '')
    if page.get_attribute('body', 'data-md-color-scheme') != SCHEMES['dark']:
        site.fault('a dark system does not get the dark scheme')
    page.close()
    site.report("the colour scheme is the system's, and can be switched", before)


def check_sorting(site: Site) -> None:
    """Each column of figures in the zoo, up and down."""
    before, columns = len(site.faults), 0
    page = site.open()
    site.go(page, 'model_zoo/')
    for table in page.locator('article table').all():
        for head in table.locator('th:has(button.sort)').all():
            name = head.inner_text().strip(' \u2195')
            if name not in ('parameters', 'FLOPs'):
                continue
            columns += 1
            for sign in (1, -1):
                head.locator('button').click()
                values = [sign * value for value in _numbers(table, head)]
                if not values or values != sorted(values):
                    site.fault(f'{name} is not sorted: {values[:6]}')
    if not columns:
        site.fault('no table can be sorted')
    page.close()
    site.report(
        f'{columns} columns of the zoo: all sort as numbers, up and down', before
    )


def _numbers(table: Locator, head: Locator) -> list[float]:
    column = head.evaluate('(e) => e.cellIndex') + 1
    cells = table.locator(f'tbody td:nth-child({column})').all_inner_texts()
    return [float(cell.split()[0]) for cell in cells if cell.strip()]


def take_pictures(site: Site, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in SCHEMES:
        for size in (DESKTOP, PHONE):
            page = site.open(scheme)
            page.set_viewport_size(size)
            for uri in SHOWN:
                site.go(page, uri)
                name = f'{uri.strip("/") or "index"}-{size["width"]}-{scheme}.png'
                page.screenshot(path=folder / name)
            page.close()
    print(f'pictures are in {folder}')


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder is served."""
    server = ThreadingHTTPServer(
        ('127.0.0.1', 0), partial(_Quiet, directory=str(folder))
    )
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}/'
    finally:
        server.shutdown()


def find_browser() -> str:
    """The program of Chromium: CHROMIUM in the environment, or one on the PATH."""
    wanted = os.environ.get('CHROMIUM')
    found = next(filter(None, map(shutil.which, [wanted] if wanted else BROWSERS)), '')
    if not found:
        raise SystemExit(
            f'error: {wanted or "Chromium"} is not installed, which looks at the site: '
            '`apt-get install chromium`, or name its program in CHROMIUM'
        )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('site', nargs='?', type=Path, default=ROOT / 'site')
    parser.add_argument('--screenshots', type=Path, metavar='DIR')
    args = parser.parse_args(argv)
    if not (args.site / 'index.html').is_file():
        raise SystemExit(f'error: {args.site} holds no site: `make docs` builds it')
    program = find_browser()
    with served(args.site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        site = Site(args.site, address, browser)
        visits = visit_all(site)
        check_links(site, visits)
        check_pictures(site, visits)
        check_search(site)
        check_toggle(site)
        check_sorting(site)
        if args.screenshots:
            take_pictures(site, args.screenshots)
        browser.close()
    if site.faults:
        print(f'error: {len(site.faults)} faults of the site', file=sys.stderr)
    return 1 if site.faults else 0


if __name__ == '__main__':
    sys.exit(main())
