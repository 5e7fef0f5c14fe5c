// Types of a dashboard's JSON, from Grafana's own; a test writes the dashboard behind them.
import type { Dashboard, FieldConfigSource, Panel, RowPanel } from "@grafana/schema";
import type { Options as StatOptions } from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type {
  FieldConfig as LineConfig,
  Options as LineOptions,
} from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

/** What JSON has in place of a type: the strings of an enum, and all else as it is. */
type Json<T> = T extends string
  ? `${T}`
  : T extends (infer Item)[]
    ? Json<Item>[]
    : T extends object
      ? { [Key in keyof T]: Json<T[Key]> }
      : T;

/** A panel of one kind, with the options and the queries of that kind. */
type Of<Kind, Options, Custom> = Omit<Json<Panel>, "type" | "options" | "fieldConfig" | "targets"> & {
  type: Kind;
  options: Json<Options>;
  fieldConfig: Json<Omit<FieldConfigSource, "defaults">> & {
    defaults: Omit<Json<FieldConfigSource["defaults"]>, "custom"> & { custom?: Json<Custom> };
  };
  targets: { refId: string; expr: string; legendFormat: string; range: boolean; instant: boolean }[];
};

type Checked = Omit<Json<Dashboard>, "panels"> & {
  panels: (Json<RowPanel> | Of<"timeseries", LineOptions, LineConfig> | Of<"stat", StatOptions, never>)[];
};
