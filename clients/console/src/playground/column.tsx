import { count, NONE, rate, seconds } from "../format";
import { type Answer, changeColumn, type Column, type Part, removeColumn, title } from "./model";

interface Props {
  column: Column;
  /** The id of the list of names to choose from. */
  names: string;
  alone: boolean;
}

/** Whom to ask, and what it answers. */
export function ColumnView({ column, names, alone }: Props) {
  const change = (at: number, some: Partial<Part>) =>
    changeColumn(column.id, (c) => ({
      ...c,
      parts: c.parts.map((p, i) => (i === at ? { ...p, ...some } : p)),
    }));
  const drop = (at: number) =>
    changeColumn(column.id, (c) => ({ ...c, parts: c.parts.filter((_, i) => i !== at) }));
  const add = () =>
    changeColumn(column.id, (c) => ({ ...c, parts: [...c.parts, { name: "", strength: 1 }] }));

  return (
    <section class="column" aria-label={`answer of ${title(column.parts)}`}>
      {column.parts.map((part, i) => (
        <div key={i} class="part">
          <input
            aria-label="adapter, route or base"
            list={names}
            value={part.name}
            placeholder="(base)"
            autocomplete="off"
            spellcheck={false}
            onInput={(event) => change(i, { name: event.currentTarget.value.trim() })}
          />
          <input
            aria-label="strength"
            title="strength: the factor on the adapter's change of the weights"
            type="number"
            step="0.1"
            value={part.strength}
            onInput={(event) => change(i, { strength: event.currentTarget.valueAsNumber || 0 })}
          />
          {column.parts.length > 1 && (
            <button type="button" aria-label={`take ${part.name || "it"} out`} onClick={() => drop(i)}>
              −
            </button>
          )}
        </div>
      ))}
      <p class="bar">
        <button type="button" onClick={add}>
          + compose
        </button>
        {!alone && (
          <button
            type="button"
            aria-label={`remove the column of ${title(column.parts)}`}
            onClick={() => removeColumn(column.id)}
          >
            remove
          </button>
        )}
      </p>
      {column.answer && <AnswerView answer={column.answer} />}
    </section>
  );
}

function AnswerView({ answer: a }: { answer: Answer }) {
  const speed =
    a.completion && a.firstToken !== null && a.total !== null && a.completion > 1
      ? `${rate((a.completion - 1) / Math.max(1e-6, a.total - a.firstToken))} tokens/s`
      : NONE;
  return (
    <>
      <pre class="answer" tabIndex={0} aria-label="answer" aria-busy={a.state === "running"}>
        {a.tokens.map((t, i) =>
          t.logprob === null ? (
            t.text
          ) : (
            <span
              key={i}
              class="token"
              style={{ "--doubt": `${Math.round(100 * (1 - Math.exp(t.logprob)))}%` }}
              title={`p = ${Math.exp(t.logprob).toPrecision(3)}`}
            >
              {t.text}
            </span>
          ),
        )}
      </pre>
      {a.error && <div class="alert bad">{a.error}</div>}
      <dl class="facts" data-state={a.state}>
        <dt>state</dt>
        <dd>
          {a.state}
          {a.finish && ` (${a.finish})`}
        </dd>
        {a.arm && <dt>arm</dt>}
        {a.arm && <dd>{a.arm}</dd>}
        <dt>first token</dt>
        <dd>{a.firstToken === null ? NONE : seconds(a.firstToken)}</dd>
        <dt>total</dt>
        <dd>{a.total === null ? NONE : seconds(a.total)}</dd>
        <dt>tokens</dt>
        <dd>
          {a.prompt === null ? NONE : count(a.prompt)} in, {count(a.completion ?? a.tokens.length)} out
        </dd>
        <dt>speed</dt>
        <dd>{speed}</dd>
      </dl>
    </>
  );
}
