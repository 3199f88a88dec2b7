"A real browser for the tests: Chromium, driven over a pipe."
import itertools, json, os, shutil, subprocess
from base64 import b64decode
from pathlib import Path

import pytest

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the PATH; to run it: apt-get install chromium")
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
         '--disable-sync', '--hide-scrollbars', '--remote-debugging-pipe']


class Browser:
    "Chromium's debugging protocol over a pair of pipes: no driver, no port, nothing to install."
    def __init__(self, profile):
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        command = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'     # where Chromium expects them
        self.process = subprocess.Popen(['bash', '-c', command, 'bash', CHROMIUM, *FLAGS, f'--user-data-dir={profile}', 'about:blank'],
                                        pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (theirs_in, theirs_out): os.close(fd)
        self.out, self.into, self.ids, self.events, self.session, self.rest = ours_out, ours_in, itertools.count(1), [], None, b''
        target = self('Target.createTarget', url='about:blank')['targetId']
        self.session = self('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'): self(f'{domain}.enable')

    def _read(self):
        "The next message."
        while b'\0' not in self.rest:
            more = os.read(self.into, 1 << 20)
            if not more: raise EOFError('the browser has gone')
            self.rest += more
        message, self.rest = self.rest.split(b'\0', 1)
        return json.loads(message)

    def __call__(self, method, **params):
        "Send a command, return its result; events on the way are kept."
        number = next(self.ids)
        os.write(self.out, json.dumps(dict(id=number, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})).encode() + b'\0')
        while (message := self._read()).get('id') != number: self.events.append(message)
        assert 'error' not in message, message
        return message['result']

    def js(self, expression):
        "What an expression is worth on the page."
        result = self('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in result, result
        return result['result'].get('value')

    def open(self, path, width=1000, dark=False, script=True, still=False):
        "Load a page at a width, by day or by night, with or without JavaScript."
        self.events.clear()
        self('Emulation.setScriptExecutionDisabled', value=not script)
        self('Emulation.setDeviceMetricsOverride', width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.light(dark, still)
        self('Page.navigate', url=Path(path).as_uri())
        while not any(e['method'] == 'Page.loadEventFired' for e in self.events): self.events.append(self._read())

    def light(self, dark, still=False):
        "By day or by night."
        wishes = {'prefers-color-scheme': 'dark' if dark else 'light', 'prefers-reduced-motion': 'reduce' if still else 'no-preference'}
        self('Emulation.setEmulatedMedia', features=[dict(name=name, value=value) for name, value in wishes.items()])

    def press(self, key, times=1):
        "A key, as from a keyboard."
        codes = {'ArrowLeft': 37, 'ArrowUp': 38, 'ArrowRight': 39, 'ArrowDown': 40, 'Tab': 9, 'Home': 36, 'End': 35}
        for kind in ('rawKeyDown', 'keyUp')*times: self('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def complaints(self):
        "What the console and the log have said, and whatever was fetched but the page."
        said = [e for e in self.events if e['method'] in ('Runtime.exceptionThrown', 'Runtime.consoleAPICalled', 'Log.entryAdded')]
        return said + [url for e in self.events if e['method'] == 'Network.requestWillBeSent' and not (url := e['params']['request']['url']).startswith(('file:', 'data:'))]

    def picture(self, path):
        "The whole page as a PNG."
        size = self('Page.getLayoutMetrics')['cssContentSize']
        png = self('Page.captureScreenshot', captureBeyondViewport=True, clip=dict(x=0, y=0, width=size['width'], height=size['height'], scale=1))
        Path(path).write_bytes(b64decode(png['data']))
        return path

    def close(self):
        try: self('Browser.close')
        except (EOFError, OSError): pass
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        for fd in (self.out, self.into): os.close(fd)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp('profile'))
    yield browser
    browser.close()
