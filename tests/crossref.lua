-- Numbered captions, cross references, callouts and chapter links as Quarto writes them, for plain pandoc.
local NAMES = {fig = 'Figure', tbl = 'Table', eq = 'Equation', sec = 'Section'}
local label, count = {}, {fig = 0, tbl = 0, eq = 0}

local function kind(id)
  local k = id:match('^(%a+)%-')
  return NAMES[k] and k
end

local function register(id)
  local k = kind(id)
  if not k then return end
  if label[id] then pandoc.log.warn('label ' .. id .. ' is used twice') end
  if k == 'sec' then label[id] = 'Section' return end
  count[k] = count[k] + 1
  label[id] = NAMES[k] .. '\u{a0}' .. count[k]
  return label[id]
end

local function number_caption(block)
  local name, words = register(block.identifier), block.caption.long[1]
  if name and words then
    words.content:insert(1, pandoc.Str(name .. ': '))
  elseif name then
    pandoc.log.warn(block.identifier .. ' has no caption')
  end
  return block
end

-- ::: {#fig-name} content, then the caption as the last paragraph :::
local function labelled_div(div)
  local k = kind(div.identifier)
  if k ~= 'fig' and k ~= 'tbl' then return end
  local caption = div.content:remove()
  return number_caption(pandoc.Figure(div.content, {long = {pandoc.Plain(caption.content)}}, div.attr)), false
end

-- $$ … $$ {#eq-name}
local function label_equations(inlines)
  for i = #inlines, 1, -1 do
    local math, space, tag = inlines[i], inlines[i + 1], inlines[i + 2]
    local id = math.t == 'Math' and tag and tag.t == 'Str' and tag.text:match('^{#(eq%-[%w_-]+)}')
    if id then
      inlines[i] = pandoc.Span({math}, {id = id})
      tag.text = tag.text:gsub('^{#[^}]+}', '')
    end
  end
  return inlines
end

local function number_equation(span)
  if kind(span.identifier) ~= 'eq' then return end
  local n = register(span.identifier):match('%d+$')
  local math = span.content[1]
  local number = PANDOC_WRITER_OPTIONS.html_math_method == 'mathml' and ' \\qquad (%s)' or ' \\tag{%s}'   -- MathML knows no tags
  math.text = math.text:gsub('%s+$', '') .. number:format(n)
  return span
end

local function refer(cite)
  local links = pandoc.Inlines {}
  for _, c in ipairs(cite.citations) do
    if not kind(c.id) then return end
    if not label[c.id] then pandoc.log.warn('cross reference @' .. c.id .. ' is not resolved') end
    if #links > 0 then links:insert(pandoc.Str ', ') end
    links:insert(pandoc.Link(label[c.id] or '?', '#' .. c.id))
  end
  return links
end

local CALLOUTS = {note = true, tip = true, warning = true, caution = true, important = true}
local function callout(div)
  local type = table.concat(div.classes, ' '):match('callout%-(%a+)')
  if not type then return end
  if not CALLOUTS[type] then pandoc.log.warn('there is no callout-' .. type) end
  local title = div.attributes.title or type:gsub('^%a', string.upper)
  if div.content[1] and div.content[1].t == 'Header' then title = div.content:remove(1).content end   -- a heading inside is its title, too
  if not FORMAT:match('html') then return pandoc.BlockQuote {pandoc.Para(pandoc.Strong(title)), table.unpack(div.content)} end
  return pandoc.Div({pandoc.Div({pandoc.Plain(title)}, {class = 'callout-header'}), pandoc.Div(div.content, {class = 'callout-body'})}, {class = 'callout callout-' .. type})
end

-- What frames a cell on a page is in the way elsewhere.
local function plain_cell(div)
  if div.classes[1] == 'cell' or div.classes[1] == 'cell-output' then return div.content end
end

-- A chapter is layers/layer.ipynb in the book, layers/layer.html on the site and nbs/layers/layer.ipynb beside the README.
local function chapter_link(link)
  local name, rest = link.target:match('^([%w_./]+)%.ipynb(.*)$')
  if not name then return end
  link.target = FORMAT:match('html') and name .. '.html' .. rest or 'nbs/' .. name .. '.ipynb' .. rest
  return link
end

function Pandoc(doc)
  return doc
    :walk {Inlines = label_equations}
    :walk {traverse = 'topdown', Div = labelled_div, Figure = number_caption, Table = number_caption,
           Span = number_equation, Header = function(h) register(h.identifier) end}
    :walk {Cite = refer, Div = callout, Link = chapter_link}
    :walk {Div = not FORMAT:match('html') and plain_cell or nil}
end
