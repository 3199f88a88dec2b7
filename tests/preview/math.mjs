// Formulas come in as JSON [{page, tex, display}, …]; those that KaTeX (strict) or MathJax (what the site loads) can't read go out as lines.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import katex from 'katex';

const formulas = JSON.parse(readFileSync(0, 'utf8'));
const mathjax = await createRequire(import.meta.url)('mathjax').init({
  loader: { load: ['input/tex-full'] },
  tex: { packages: { '[-]': ['bussproofs', 'noerrors', 'noundefined'] }, formatError: (_, error) => { throw error; } },
});
const judges = {
  KaTeX: (tex, display) => katex.renderToString(tex, { displayMode: display, throwOnError: true, strict: 'error' }),
  MathJax: (tex, display) => mathjax.tex2mml(tex, { display }),
};
for (const { page, tex, display } of formulas)
  for (const [judge, read] of Object.entries(judges))
    try { read(tex, display); } catch (error) { console.log(`${page}: ${judge}: ${error.message.split('\n')[0]} in ${tex}`); }
