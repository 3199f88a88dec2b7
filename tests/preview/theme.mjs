// The site's theme as Quarto would compile it: our defaults, a theme of Bootswatch on Bootstrap, then the preview's layout and our rules.
// node theme.mjs THEME.scss OUT writes OUT/theme-light.css and OUT/theme-dark.css.
import { readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { compileString } from 'sass';

const here = dirname(fileURLToPath(import.meta.url));
const [theme, out] = process.argv.slice(2);
const text = readFileSync(theme, 'utf8');
const part = name => text.split(`/*-- scss:${name} --*/`)[1]?.split('/*-- scss:')[0] ?? '';

for (const [mode, swatch] of Object.entries({ light: 'flatly', dark: 'darkly' })) {
  const source = [part('defaults'), `@import "bootswatch/dist/${swatch}/variables";`, '@import "bootstrap/scss/bootstrap";',
                  `@import "bootswatch/dist/${swatch}/bootswatch";`, readFileSync(join(here, 'preview.scss'), 'utf8'), part('rules')].join('\n');
  const { css } = compileString(source, { loadPaths: [join(here, 'node_modules')], quietDeps: true, style: 'compressed', logger: { warn() {}, debug() {} } });
  writeFileSync(join(out, `theme-${mode}.css`), css);
}
